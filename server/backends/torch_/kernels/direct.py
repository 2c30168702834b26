"""y = x weight^T for a few rows of x: cuda/direct.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from server.backends.torch_.kernels import driver
from server.backends.torch_.kernels.packed import Packed

FILES = ("ptx", "decode", "direct")
THREADS = 256


@dataclass(frozen=True, slots=True)
class Cut:
    """Tiles of 8 rows of x, and spans of 128 columns that a warp reads at once."""

    tiles: int
    ahead: int


CUTS = (Cut(1, 2), Cut(1, 4), Cut(2, 2))
MOST_ROWS = 16  # of x: from there on the weights that lie in shared memory are read by more warps
BLOCKS = 2  # on a processor: where there are no more, each has to read more at once


def cut(packed: Packed, batch: int, processors: int) -> Cut | None:
    """The fastest, as measured on an H200; None where the kernel for more rows is."""
    if batch > MOST_ROWS:
        return None
    if batch > 8:
        return Cut(2, 2)
    if packed.words.shape[0] > BLOCKS * processors:
        return Cut(1, 2)
    return Cut(1, 4) if packed.book is None else Cut(2, 2)


def module(packed: Packed, x: Tensor) -> driver.Module:
    return driver.load(x.device, FILES, tuple(defines(packed, x.dtype).items()))


def defines(packed: Packed, dtype: torch.dtype) -> dict[str, int]:
    """What the sources of the packed layers' kernels are compiled with."""
    return {
        "BITS": packed.bits,
        "BOOK": int(packed.book is not None),
        "BF16": int(dtype == torch.bfloat16),
        "SCALES": packed.span_scales,
    }


def launch(
    kernels: driver.Module, x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, cut: Cut
) -> None:
    rows, columns = packed.shape
    sizes = (x.shape[0], rows, columns, packed.chunks, packed.groups, packed.shift, int(y.dtype != x.dtype))
    tensors = (x, packed.words, packed.scales, packed.book, bias, y)
    grid = (packed.words.shape[0], 1, 1)
    kernels.launch(f"direct_{cut.tiles}_{cut.ahead}", grid, THREADS, (*tensors, *sizes))
