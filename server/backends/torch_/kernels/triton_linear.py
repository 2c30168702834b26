"""The packed layers in Triton: where CUDA C++ cannot be compiled. The same numbers, slower.

Importing this module raises ImportError where Triton is missing.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from server.backends.torch_.kernels.packed import Packed

ROWS, COLUMNS = 64, 64  # of the weight, for one program and one step


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913, PLR0917
    x, words, scales, book, bias, y, batch, rows, columns, chunks, groups, shift,  # noqa: ANN001
    BITS: tl.constexpr, BOOK: tl.constexpr, BIAS: tl.constexpr, SCALES: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    inside = row < rows
    tile, lower, g = row // 16, (row // 8) % 2, row % 8
    total = tl.zeros((BATCH, ROWS), dtype=tl.float32)
    for chunk in range(chunks):
        within = tl.arange(0, COLUMNS)
        column = chunk * COLUMNS + within
        half, t, e = within // 32, (within // 8) % 4, within % 8
        lane = g[None, :] * 4 + t[:, None]
        base = (tile * chunks + chunk)[None, :].to(tl.int64)
        if BITS == 4:
            address = (base * 32 + lane) * 4 + lower[None, :] * 2 + half[:, None]
            bits = e * 4 if BOOK else ((e % 2) * 4 + e // 2) * 4
            mask = 15
        else:
            address = ((base * 2 + half[:, None]) * 32 + lane) * 4 + lower[None, :] * 2 + (e // 4)[:, None]
            bits = (e % 4) * 8
            mask = 255
        codes = (tl.load(words + address, mask=inside[None, :], other=0) >> bits[:, None]) & mask
        group = (((chunk * 2 + half) * SCALES) // 4) >> shift
        place = (tile[None, :] * groups + group[:, None]) * 16 + (row % 16)[None, :]
        word = tl.load(scales + place, mask=inside[None, :], other=0)
        scale = (word & -256).to(tl.float32, bitcast=True)
        if BOOK:  # noqa: SIM108  Triton compiles one branch only
            weight = tl.load(book + codes) * scale
        else:
            weight = (codes - (word & 255)).to(tl.float32) * scale
        known = (item < batch)[:, None] & (column < columns)[None, :]
        left = tl.load(x + item[:, None] * columns + column[None, :], mask=known, other=0.0)
        total = tl.dot(left, weight.to(left.dtype), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + item[:, None] * rows + row[None, :],
        total.to(y.dtype.element_ty),
        mask=(item < batch)[:, None] & inside[None, :],
    )


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """x [batch, columns] float16 or bfloat16 -> [batch, rows] in the same dtype, or float32 if `wide`."""
    rows, columns = packed.shape
    y = torch.empty(x.shape[0], rows, dtype=torch.float32 if wide else x.dtype, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(x.shape[0], block))
    constants: dict[str, Any] = {
        "BITS": packed.bits,
        "BOOK": packed.book is not None,
        "BIAS": bias is not None,
        "SCALES": packed.span_scales,
        "BATCH": block,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    book, added = (x if item is None else item for item in (packed.book, bias))
    sizes = (x.shape[0], rows, columns, packed.chunks, packed.groups, packed.shift)
    if x.shape[0]:
        _kernel[grid](x, packed.words, packed.scales, book, added, y, *sizes, **constants)
    return y
