"""What folding methods (AWQ, SmoothQuant) did to each matrix, told by other tensors of the same variant.

A fold divides the channels of a norm or linear by scales and multiplies the columns of the linears that read
them. So scales are read where they went in, and held against the columns that they ought to have changed:

- of a norm: the source's weight over the variant's is the scale, exactly. Norms themselves are not compared.
- of a linear (values before the attention's output, up before down): each row of it is fitted by least
  squares. A row with a wrong scale looks right by itself, but puts a column of the linear behind it out.

A matrix of 4 bits hardly shows another block's norm, which may differ by 5 %. Its columns do, each fitted to
the source's: errors of rounding cancel in them, and what methods do on purpose (clipping, GPTQ) moves them
by less than half of what it moves single weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quant.families import Family, ScaleGroup
from quant.measure.rounding import Pair, Rows, float_pair

Doubles = npt.NDArray[np.float64]
Names = Callable[[str], bool]
LOST = 1e-3  # of the squared weights: a matrix that scales make smaller than this was zeroed, not scaled
VANISHED = 1e4  # a scale that no fold has stands for an infinite one
FAINT = 1e-6  # of the rows' mean square: a row below it may be rounded to nothing
# Of what rounding moves single weights by: columns behind a norm or linear, which also has clipped ranges.
NORM_MOVES, LINEAR_MOVES = 0.28, 0.5


@dataclass(frozen=True, slots=True)
class Fold:
    """One scale group of one block, under full names."""

    source: str
    linears: tuple[str, ...]
    is_norm: bool
    per_head: bool  # the linears' columns are those of heads, several of which may read one of the source's


def folds_of(family: Family, blocks: int, is_quantized: Names, is_there: Names) -> Iterator[Fold]:
    """Groups that can have been folded: all their linears are quantized, and their source has no bias."""
    for block in map(family.block_name, range(blocks)):
        for group in family.scale_groups:
            fold = _fold(block, group, family)
            known = is_there(f"{fold.source}.weight") if fold.is_norm else is_quantized(fold.source)
            if known and all(map(is_quantized, fold.linears)) and not is_there(f"{fold.source}.bias"):
                yield fold


def _fold(block: str, group: ScaleGroup, family: Family) -> Fold:
    linears = tuple(f"{block}.{name}" for name in group.linears)
    is_norm = group.source not in family.linears
    return Fold(f"{block}.{group.source}", linears, is_norm, per_head=group.per_head is not None)


def norm_scales(own: Rows, found: Rows, offset: float) -> Doubles:
    """[channels]."""
    whole, left = own.astype(np.float64) + offset, found.astype(np.float64) + offset
    scales = np.where(left == 0, VANISHED, whole / np.where(left == 0, 1.0, left))
    return np.where(whole == left, 1.0, scales)


def row_scales(own: Rows, found: Rows, again: Callable[[Rows], Rows]) -> Doubles:
    """[rows]: what the rows were multiplied by; NaN where they are too faint to say.

    `again` rounds as the variant's type does. Small numbers beside large ones become 0, which makes a fit
    too small: by the same factor for a row that is known to be multiplied by 1.
    """
    squares = np.einsum("ij,ij->i", own, own, dtype=np.float64)
    kept = np.einsum("ij,ij->i", own, again(own), dtype=np.float64)
    fitted = np.einsum("ij,ij->i", own, found, dtype=np.float64)
    known = (squares > FAINT * squares.mean()) & (kept > FAINT * squares)
    return np.where(known, np.where(fitted > 0, fitted, kept) / np.where(known, kept, 1.0), np.nan)


def column_scales(rows: Doubles, own: Rows, found: Rows, heads: int) -> Doubles:
    """[columns] of the linear that reads a source with these rows: 1 / row; fitted where that is not known.

    `heads`: of the columns, 1 where channels are not those of heads; heads may share a source's.
    """
    size = own.shape[1] // heads
    by_head = (1.0 / rows).reshape(-1, 1, size)
    scales = np.broadcast_to(by_head, (len(by_head), own.shape[1] // len(rows), size)).ravel()
    over = np.maximum(np.einsum("ij,ij->j", own, own, dtype=np.float64), 1e-30)
    fitted = np.einsum("ij,ij->j", own, found, dtype=np.float64) / over
    return np.where(np.isnan(scales), fitted, scales)


def scaled(own: Rows, rows: Doubles | None, columns: Doubles | None) -> Rows:
    """The source's matrix under these scales; itself where they make nothing of it."""
    found = own if columns is None else own * columns.astype(np.float32)
    found = found if rows is None else found * np.nan_to_num(rows, nan=1.0).astype(np.float32)[:, None]
    lost = np.square(found).sum() < LOST * np.square(own).sum()
    return own if lost else np.asarray(found, np.float32)


@dataclass(slots=True)
class Columns:
    """Of all linears that a fold reaches, sums over their rows; the source's are scaled as the variant's."""

    own: list[Doubles] = field(default_factory=list)  # [columns], squares
    found: list[Doubles] = field(default_factory=list)  # products with the source's
    again: list[Doubles] = field(default_factory=list)  # the same of the source's rows, rounded again
    lost: list[float] = field(default_factory=list)  # squares of what rounding changes

    def add(self, own: Rows, found: Rows, again: Callable[[Rows], Rows]) -> None:
        rounded = again(own)
        for sums, other in ((self.own, own), (self.found, found), (self.again, rounded)):
            sums.append(np.einsum("ij,ij->j", own, other, dtype=np.float64))
        self.lost.append(float(np.square(rounded - own, dtype=np.float64).sum()))

    def pair(self, fold: Fold) -> Pair:
        """Lengths of the source's columns and what of them is found in the variant's."""
        squares, found, again = (np.sum(sums, axis=0) for sums in (self.own, self.found, self.again))
        lengths = np.sqrt(np.maximum(squares, 1e-30))
        total = max(float(squares.sum()), 1e-30)
        share = NORM_MOVES if fold.is_norm else LINEAR_MOVES
        moved = float(np.square((again - squares) / lengths).sum()) + share**2 * sum(self.lost)
        own, other = (np.asarray(row, np.float32)[None] for row in (lengths, found / lengths))
        return float_pair(f"{fold.source} (channels)", own, other, error=(moved / total) ** 0.5)
