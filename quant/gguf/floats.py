"""Between the three float formats of checkpoints and GGUF files, with numpy alone.

bfloat16 travels as its uint16 bits: the upper half of a float32.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Singles = npt.NDArray[np.float32]

STORED: Mapping[str, np.dtype[np.generic]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
}


def convert(stored: Array, kind: str, wanted: str) -> Array:
    """`stored` (of STORED[kind]) as STORED[wanted], to nearest even. ValueError says what cannot be kept."""
    if kind == wanted:
        _refuse_special(stored, kind)
        return stored
    singles = _WIDEN[kind](stored)
    if not np.isfinite(singles).all():
        raise ValueError("has NaN or infinite values")
    result = _NARROW[wanted](singles)
    _refuse_special(result, wanted)
    return result


def _refuse_special(stored: Array, kind: str) -> None:
    if kind == "bf16":
        special = (stored.view("<u2") & 0x7F80) == 0x7F80
    else:
        special = ~np.isfinite(stored.astype(STORED[kind], copy=False))
    if special.any():
        raise ValueError("has NaN or infinite values")


def _from_bf16(bits: Array) -> Singles:
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


def _to_bf16(singles: Singles) -> Array:
    bits = np.ascontiguousarray(singles).view("<u4")
    even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    result: Array = ((bits + even) >> np.uint32(16)).astype("<u2")
    return result


def _to_f16(singles: Singles) -> Array:
    with np.errstate(over="ignore"):
        result = singles.astype("<f2")
    if not np.isfinite(result).all():
        raise ValueError("holds a value beyond float16's range (65,504); bf16 and f32 can hold it")
    return result


_WIDEN: Mapping[str, Callable[[Array], Singles]] = {
    "f32": lambda stored: stored.view("<f4"),
    "f16": lambda stored: stored.astype("<f4"),
    "bf16": _from_bf16,
}
_NARROW: Mapping[str, Callable[[Singles], Array]] = {
    "f32": lambda singles: singles,
    "f16": _to_f16,
    "bf16": _to_bf16,
}
