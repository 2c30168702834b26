"""Quantized linear layers in the kernels' order: made once at load, from the plain forms of `quant.layer`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from quant.layer import AffineLinear, CodebookLinear, Int8Linear, NestedScales, QuantizedLinear
from server.backends.torch_.kernels import layout

LLM_INT8_THRESHOLD = 6.0  # activations beyond it stay as they are (LLM.int8, arXiv:2208.07339)
SMALLEST_GROUP = 32
FACTORS = 1 << 16  # that are tried for a codebook


class CannotPack(Exception):
    """This layer's shape or groups are not among those that the kernels read."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One matrix in fragment order.

    `words` are codes, `scales` words of `layout.pack_scales`: `span_scales` of them for 128 columns, or one
    for 2^`shift` times 128. `book` holds the 16 values of a codebook. `threshold` is set for LLM.int8.
    """

    shape: tuple[int, int]  # rows, columns
    bits: int
    words: Tensor
    scales: Tensor
    span_scales: int  # 1, 2 or 4
    shift: int
    book: Tensor | None = None
    threshold: float | None = None

    @property
    def chunks(self) -> int:
        return self.words.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> "Packed":
        book = None if self.book is None else self.book.to(device)
        return replace(self, words=self.words.to(device), scales=self.scales.to(device), book=book)

    def pieces(self, weights: int) -> Iterator["Packed"]:
        """The same, about so many weights at a time: some rows, below them the next ones."""
        rows, columns = self.shape
        tiles = max(1, weights // (layout.TILE_ROWS * columns))
        for start in range(0, self.words.shape[0], tiles):
            left = rows - start * layout.TILE_ROWS
            yield replace(
                self,
                shape=(min(left, tiles * layout.TILE_ROWS), columns),
                words=self.words[start : start + tiles],
                scales=self.scales[start : start + tiles],
            )

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]: what the kernels multiply with, for the CPU and for tests."""
        rows, columns = self.shape
        order = layout.PAIRED if self.book is None else layout.PLAIN
        codes = layout.unpack8(self.words) if self.bits == 8 else layout.unpack4(self.words, order)
        scales, zeros = layout.unpack_scales(self.scales)
        width = min(layout.SPAN_COLUMNS // self.span_scales << self.shift, codes.shape[1])
        spread = scales.repeat_interleave(width, dim=1)[:rows, :columns]
        if self.book is not None:
            return self.book[codes[:rows, :columns].long()] * spread
        centred = codes.float() - zeros.float().repeat_interleave(width, dim=1)[:, : codes.shape[1]]
        return centred[:rows, :columns] * spread


def pack(layer: QuantizedLinear, dtype: torch.dtype = torch.float16) -> Packed:
    """On the device that holds the layer, to be multiplied in `dtype`. Raises CannotPack."""
    match layer:
        case AffineLinear():
            return _pack_affine(layer)
        case CodebookLinear():
            return _pack_codebook(layer, dtype)
        case Int8Linear():
            return _pack_int8(layer)


def concatenate(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Layers with the same input as one, rows below rows. Raises CannotPack where they differ in kind."""
    first = layers[0]
    if isinstance(first, AffineLinear):
        same = [item for item in layers if isinstance(item, AffineLinear) and item.scheme == first.scheme]
        if len(same) == len(layers) and len({item.scales.dtype for item in same}) == 1:
            return AffineLinear(
                first.scheme,
                torch.cat([item.codes for item in same]),
                torch.cat([item.scales for item in same]),
                torch.cat([item.zeros for item in same]),
            )
    if isinstance(first, Int8Linear):
        eights = [item for item in layers if isinstance(item, Int8Linear)]
        if len(eights) == len(layers):
            return Int8Linear(
                torch.cat([item.codes for item in eights]), torch.cat([item.absmax for item in eights])
            )
    if isinstance(first, CodebookLinear):
        return _concatenate_codebooks(layers, first)
    raise CannotPack("layers of different schemes do not share a matrix")


def _concatenate_codebooks(layers: Sequence[QuantizedLinear], first: CodebookLinear) -> CodebookLinear:
    found = [item for item in layers if isinstance(item, CodebookLinear)]
    if len(found) < len(layers) or any(
        (item.kind, item.blocksize) != (first.kind, first.blocksize) or item.codes.numel() % item.blocksize
        for item in found
    ):
        raise CannotPack("layers of different codebooks or blocks do not share a matrix")
    codes = torch.cat([item.codes for item in found])
    return replace(first, codes=codes, absmax=torch.cat([_absmax(item) for item in found]))


def _absmax(layer: CodebookLinear) -> Tensor:
    return layer.absmax.dequantize() if isinstance(layer.absmax, NestedScales) else layer.absmax


def _pack_affine(layer: AffineLinear) -> Packed:
    if layer.scheme.bits not in {4, 8}:
        raise CannotPack(f"there is no kernel for {layer.scheme.bits} bits")
    words = layout.pack8(layer.codes) if layer.scheme.bits == 8 else layout.pack4(layer.codes)
    grid = _grid(layer.scales.float(), layer.zeros, layer.scheme.group, layer.shape)
    return Packed(layer.shape, layer.scheme.bits, words, *grid)


def _pack_codebook(layer: CodebookLinear, dtype: torch.dtype) -> Packed:
    rows, columns = layer.shape
    if columns % layer.blocksize:
        raise CannotPack("blocks of a codebook run across rows")
    words = layout.pack4(layer.codes, layout.PLAIN)
    factor = least_rounded(tuple(layer.codebook.tolist()), dtype)
    grid = _grid(_absmax(layer).view(rows, -1) / factor, None, layer.blocksize, layer.shape)
    book = layer.codebook.float() * factor  # no view, which would keep the checkpoint's whole file mapped
    return Packed(layer.shape, 4, words, *grid, book=book)


@cache
def least_rounded(book: tuple[float, ...], dtype: torch.dtype) -> float:
    """The factor between 1 and 2 by which a codebook's values lie nearest to numbers of `dtype`.

    Kernels multiply with values of 16 bits, and apply the scales, which the factor is taken out of, to sums.
    NF4's own values are off by 1.6e-4 of their size in float16, times the best factor by 6e-5; FP4's by none.
    """
    factors = torch.linspace(1.0, 2.0, FACTORS, dtype=torch.float64)
    values = factors[:, None] * torch.tensor(book, dtype=torch.float64)
    off = ((values.to(dtype).double() - values) / factors[:, None]).square().sum(1)
    return float(factors[off.argmin()])


def _pack_int8(layer: Int8Linear) -> Packed:
    codes = (layer.codes.to(torch.int16) + 128).to(torch.uint8)
    zeros = torch.full((len(codes), 1), 128, dtype=torch.uint8, device=codes.device)
    grid = _grid((layer.absmax / 127.0)[:, None], zeros, None, layer.shape)
    return Packed(layer.shape, 8, layout.pack8(codes), *grid, threshold=LLM_INT8_THRESHOLD)


def _grid(
    scales: Tensor, zeros: Tensor | None, group: int | None, shape: tuple[int, int]
) -> tuple[Tensor, int, int]:
    """Scale words, scales in 128 columns, shift. Odd groups become several of a width that is known."""
    columns = shape[1]
    if columns % 8:
        raise CannotPack("rows of activations are not whole 16-byte pieces")
    if group is None or group >= columns:
        return layout.pack_scales(scales, zeros, 1), 1, 31
    width = group & -group  # the largest power of two that divides it
    if width < SMALLEST_GROUP:
        raise CannotPack(f"groups of {group} columns do not fit the kernels")
    if width < group:
        scales = scales.repeat_interleave(group // width, dim=1)
        zeros = None if zeros is None else zeros.repeat_interleave(group // width, dim=1)
    groups = -(-layout.padded(columns, layout.CHUNK_COLUMNS) // width)
    words = layout.pack_scales(scales[:, :groups], None if zeros is None else zeros[:, :groups], groups)
    spans = layout.SPAN_COLUMNS
    return words, max(1, spans // width), max(0, (width // spans).bit_length() - 1)
