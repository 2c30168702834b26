"""8-bit activations: whole numbers of steps of a row's own size, times weights that are whole numbers, too.

A GPU multiplies the int8 codes. A CPU has them as float32 numbers instead, dequantized: products of codes are
exact in float32 and their sums nearly so, and no torch kernel for int8 is as fast there.
"""

from torch import Tensor, nn

from server.backends.torch_.kernels.activations import round_rows
from server.backends.torch_.kernels.w8a8 import Signed8
from server.backends.torch_.kernels.w8a8 import linear as signed_linear

LLM_INT8_THRESHOLD = 6.0  # activations from here on stay as they are (LLM.int8, arXiv:2208.07339)


class RoundedLinear(nn.Module):
    """A row's activations become multiples of its largest / 127, but those beyond `threshold`."""

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner = inner
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        rounded = round_rows(x.reshape(-1, x.shape[-1]), self.threshold).view(x.shape)
        out: Tensor = self.inner(rounded)
        return out


class SignedLinear(nn.Module):
    """int8 weights and activations (SmoothQuant's dynamic scheme, arXiv:2211.10438)."""

    def __init__(self, weight: Signed8, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return signed_linear(x, self.weight, self.bias)
