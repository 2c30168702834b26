"""Weights in the kernels' order: 4 or 8 bits in memory, unpacked where they are multiplied."""

from torch import Tensor, nn

from server.backends.torch_.kernels.linear import linear
from server.backends.torch_.kernels.packed import Packed


class PackedLinear(nn.Module):
    """y = x weight^T + bias. The kernels say which shapes and groups they take."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, *, wide: bool = False) -> Tensor:
        return linear(x, self.packed, self.bias, wide=wide)
