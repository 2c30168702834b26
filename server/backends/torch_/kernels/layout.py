"""Codes and scales in the order in which the kernels read them (cuda/decode.cu), and back.

A chunk is 16 rows x 64 columns: what a warp multiplies at a time. Lane 4g + t holds of rows g and g + 8 the
columns 8t to 8t+7 ("first half") and 32+8t to 32+8t+7 ("second half"): the positions that mma.m16n8k16 gives
the lane, up to an order of the columns that the activations follow. The chunks of 16 rows lie one after the
other, so that a warp reads a run of bytes.
docs/kernels.md has the picture.
"""

import torch
from torch import Tensor

TILE_ROWS = 16
CHUNK_COLUMNS = 64
SPAN_COLUMNS = 128  # columns whose scales a warp reads at a time

PAIRED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where column i of eight lies among a word's nibbles: one mask takes out a pair of 16-bit floats."""
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)
"""The same for codes that index a table, of which a byte looks up a pair."""


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def pack4(codes: Tensor, order: tuple[int, ...] = PAIRED) -> Tensor:
    """uint8 [rows, columns], 0 to 15, to int32 [tiles, chunks, 32 lanes, 4 words]."""
    fragments = _fragments(codes)  # tile lower g chunk half t column
    words = torch.zeros(fragments.shape[:-1], dtype=torch.int32, device=codes.device)
    for column, nibble in enumerate(order):
        words |= fragments[..., column].int() << (4 * nibble)
    tiles, _, _, chunks, _, _ = words.shape
    return words.permute(0, 3, 2, 5, 1, 4).reshape(tiles, chunks, 32, 4).contiguous()


def unpack4(words: Tensor, order: tuple[int, ...] = PAIRED) -> Tensor:
    """The inverse, with the padding."""
    tiles, chunks = words.shape[:2]
    lanes = words.view(tiles, chunks, 8, 4, 2, 2).permute(0, 4, 2, 1, 5, 3)
    columns = [(lanes >> (4 * nibble)) & 15 for nibble in order]
    return _matrix(torch.stack(columns, dim=-1).to(torch.uint8))


def pack8(codes: Tensor) -> Tensor:
    """uint8 [rows, columns] to int32 [tiles, chunks, 2 halves, 32 lanes, 4 words]."""
    fragments = _fragments(codes)
    tiles, _, _, chunks = fragments.shape[:4]
    ordered = fragments.permute(0, 3, 4, 2, 5, 1, 6).contiguous()  # tile chunk half g t lower column
    return ordered.view(torch.int32).reshape(tiles, chunks, 2, 32, 4)


def unpack8(words: Tensor) -> Tensor:
    tiles, chunks = words.shape[:2]
    ordered = words.contiguous().view(torch.uint8).view(tiles, chunks, 2, 8, 4, 2, 8)
    return _matrix(ordered.permute(0, 5, 3, 1, 2, 4, 6))


def _fragments(codes: Tensor) -> Tensor:
    """[tile, lower, g, chunk, half, t, column] of a matrix padded to whole chunks."""
    rows, columns = padded(codes.shape[0], TILE_ROWS), padded(codes.shape[1], CHUNK_COLUMNS)
    return pad(codes, rows, columns).view(rows // TILE_ROWS, 2, 8, columns // CHUNK_COLUMNS, 2, 4, 8)


def _matrix(fragments: Tensor) -> Tensor:
    tiles, _, _, chunks = fragments.shape[:4]
    return fragments.reshape(tiles * TILE_ROWS, chunks * CHUNK_COLUMNS)


def pack_scales(scales: Tensor, zeros: Tensor | None, groups: int) -> Tensor:
    """[rows, fewer groups] to int32 [tiles, groups, 16 rows]: a float32 whose low 8 bits are the zero point.

    The float keeps 15 bits after the point: scales stored as float16 or bfloat16 stay exact.
    """
    rows = padded(scales.shape[0], TILE_ROWS)
    bits = (pad(scales.float(), rows, groups).contiguous().view(torch.int32) + 0x80) & ~0xFF
    if zeros is not None:
        bits |= pad(zeros, rows, groups).int()
    return bits.view(rows // TILE_ROWS, TILE_ROWS, groups).permute(0, 2, 1).contiguous()


def unpack_scales(words: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales and uint8 zeros, [rows, groups], with the padding."""
    flat = words.permute(0, 2, 1).reshape(-1, words.shape[1])
    return (flat & ~0xFF).view(torch.float32), (flat & 0xFF).to(torch.uint8)
