"""8-bit activations: whole numbers of steps of a row's own size, times weights that are whole numbers, too.

The sums are exact, so that a row's numbers are its own, whatever else is in the batch.
"""

import math

from torch import Tensor, nn

from server.backends.torch_.kernels.activations import round_rows
from server.backends.torch_.kernels.w8a8 import Signed8
from server.backends.torch_.kernels.w8a8 import linear as signed_linear


class SignedLinear(nn.Module):
    """int8 weights and activations: SmoothQuant's dynamic scheme (arXiv:2211.10438), and with a `threshold`,
    from which on activations stay as they are, LLM.int8 (arXiv:2208.07339)."""

    def __init__(self, weight: Signed8, bias: Tensor | None, threshold: float = math.inf) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.threshold = threshold

    def forward(self, x: Tensor, *, wide: bool = False) -> Tensor:
        return signed_linear(x, self.weight, self.bias, self.threshold, wide=wide)


class RoundedLinear(nn.Module):
    """For weights that are no int8 matrix with one scale a row, or that a GPU holds unpacked: a row's
    activations become multiples of its largest / 127, but those beyond `threshold`, and stay floats."""

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner = inner
        self.threshold = threshold

    def forward(self, x: Tensor, *, wide: bool = False) -> Tensor:
        rounded = round_rows(x.reshape(-1, x.shape[-1]), self.threshold).view(x.shape)
        out: Tensor = self.inner(rounded, wide=wide)
        return out
