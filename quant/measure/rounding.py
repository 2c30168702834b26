"""Whether each matrix of a variant is the source's, rounded: a broken one is far beyond what its type rounds.

Unlike the divergence of the whole model, this does not depend on how coarse a type is: 4 bits round a matrix
by about 0.07 of its length, whatever the model, and one with another's scales is several times as far away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from quant.ggml import FLOAT_TYPES
from quant.gguf.rounding import is_known, rounded, unpacked
from quant.measure.gate import ROWS_WORSE
from quant.measure.measurement import Matrix, Rounding

Rows = npt.NDArray[np.float32]
WORST = 5
ALL_WEIGHTS = 100_000_000  # of a model that is read whole; of larger ones a sample of rows
SAMPLED_ROWS = 64
LARGEST = 32_000_000  # weights of one matrix that are read
ROUNDED_ROWS = 32  # that are rounded again, to know what the type does to them
FAINT = 1e-3  # of the rows' mean square: what a row below it loses does not matter
BROKEN = 1e9  # stands for NaN
FLOAT_ERROR = 1e-3  # of its length that a tensor may be off which stays floats: more than float16 rounds
FLOATS = frozenset(kind.upper() for kind in FLOAT_TYPES) | {"F64"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Rows of one matrix, the source's and the variant's. `again` rounds rows as the variant's type does."""

    name: str
    source: Rows
    variant: Rows
    again: Callable[[Rows], Rows]
    costly: bool  # to round again: a few rows stand for all


def rounding_of(pairs: Iterator[Pair]) -> Rounding | None:
    """None where nothing can be compared."""
    found = [matrix for pair in pairs if (matrix := _compared(pair))]
    if not found:
        return None
    worst = sorted(found, key=lambda one: -max(one.times, one.row_times / ROWS_WORSE))
    return Rounding(matrices=len(found), worst=tuple(worst[:WORST]))


def _compared(pair: Pair) -> Matrix | None:
    """Errors are squares, relative to the source's own: of the whole matrix, and of rows."""
    step = max(1, len(pair.source) // ROUNDED_ROWS) if pair.costly else 1
    some = pair.source[::step]
    own, off = _squares(pair.source), _squares(pair.variant - pair.source)
    promised, of = _squares(pair.again(some) - some), _squares(some)
    if not own.sum() or not of.sum():
        return None
    expected = max(float(promised.sum() / of.sum()), 1e-12)
    error = float(off.sum() / own.sum())
    floors = np.full(len(own), expected) if pair.costly else promised / np.maximum(of, 1e-300)
    rows = off / np.maximum(own, 1e-300) / np.maximum(floors, 0.1 * expected)
    worst = float(np.where(own > FAINT * own.mean(), rows, 0.0).max())
    if not np.isfinite(error):
        error = worst = BROKEN
    return Matrix(
        name=pair.name,
        error=round(error**0.5, 6),
        expected=round(expected**0.5, 6),
        times=round(error / expected, 2),
        row_times=round(worst, 2),
    )


def _squares(rows: Rows) -> npt.NDArray[np.float64]:
    """By row. Single precision is enough for a ratio, and several times as fast."""
    found: npt.NDArray[np.float64] = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    return found


# -- GGUF -----------------------------------------------------------------------------------------


def gguf_pairs(source: Path, variant: Path) -> Iterator[Pair]:
    """`source`: a GGUF file of floats with the same tensors."""
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    ours = gguf.GGUFReader(variant).tensors
    sampled = sum(int(tensor.n_elements) for tensor in ours) > ALL_WEIGHTS
    for tensor in ours:
        other, kind = theirs.get(tensor.name), tensor.tensor_type.name.lower()
        if other is None or tuple(other.shape) != tuple(tensor.shape) or other.tensor_type.name not in FLOATS:
            continue
        if kind.upper() in FLOATS:
            yield float_pair(tensor.name, _sample(other, sampled), _sample(tensor, sampled))
        elif len(tensor.shape) > 1 and kind.upper() not in FLOATS and is_known(kind):
            own, found = _sample(other, sampled), _sample(tensor, sampled)
            yield Pair(tensor.name, own, found, partial(rounded, kind), costly=True)


def float_pair(name: str, source: Rows, variant: Rows, error: float = FLOAT_ERROR) -> Pair:
    """Of a tensor that is not quantized: norms, biases, small matrices. `error`: of its length, is right."""
    return Pair(name, source, variant, lambda rows: rows * np.float32(1 + error), costly=False)


def row_step(rows: int, weights: int, sampled: bool) -> int:
    """The distance of the rows that are read: not all of a large embedding, held three times."""
    return max(1, rows // SAMPLED_ROWS) if sampled else -(-weights // LARGEST)


def _sample(tensor: Any, sampled: bool) -> Rows:
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    some = rows[:: row_step(len(rows), int(tensor.n_elements), sampled)]
    if some.dtype == np.uint8:
        return unpacked(tensor.tensor_type.name.lower(), some)
    found: Rows = some.astype(np.float32)
    return found
