"""Layers that share their input (q, k and v; gate and up) computed as one.

Modeling code calls them one by one with the same tensor. The first call computes all of them, the others take
their part; nothing is kept after the last.
"""

from torch import Tensor, nn


class Merged(nn.Module):
    """Linear layers, one below the other in one matrix."""

    def __init__(self, whole: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.whole = whole
        self._sizes = sizes
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        if x is not self._input or index not in self._parts:
            self._input, self._parts = x, dict(enumerate(self.whole(x).split(self._sizes, dim=-1)))
        found = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return found


class Part(nn.Module):
    """One of the layers, in its place in the model. The first of them owns the matrix."""

    def __init__(self, merged: Merged, index: int) -> None:
        super().__init__()
        if index == 0:
            self.merged = merged
        else:
            self._other = [merged]  # in a list: no submodule a second time
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        merged = self.merged if self.index == 0 else self._other[0]
        return merged.part(self.index, x)
