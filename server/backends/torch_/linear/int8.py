"""8-bit activations on a CPU: rows rounded to 255 steps, multiplied with weights that are so many steps, too.

The numbers of an int8 product: products of codes are exact in float32, and sums nearly so.
"""

from torch import Tensor, nn

from server.backends.torch_.kernels.activations import round_rows

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
