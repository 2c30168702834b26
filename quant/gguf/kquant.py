"""llama.cpp's quantizer, called through ctypes: every type it has, types by tensor, importance matrices."""

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quant.errors import BadRecipe, BuildFailed, DiskFull, QuantError
from quant.files import NO_ROOM
from quant.ggml import FILE_TYPES, FLOAT_TYPES, TENSOR_TYPES
from quant.gguf.header import read_header
from quant.gguf.imatrix import Importance, read_imatrix
from quant.gguf.native import Log, captured, library
from quant.gguf.outcome import STREAM, Errno, asked, is_whole
from quant.recipe import GgufRecipe

STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # llama.cpp says so before each tensor
BUFFER = 512 * 2**20  # bytes of a tensor's rows in memory at once; the result is the same for any size
FULL = 2**20  # bytes that a disk takes which is not full
CUT = "the file that it wrote is cut short"
FUNCTION = re.compile(r"^\w+: (failed to quantize: )?")
UNFIT = ("imatrix", "importance matrix", "no tensor type fallback")  # the recipe is wrong, not llama.cpp


def quantize(
    source: Path,
    target: Path,
    recipe: GgufRecipe,
    *,
    progress: Callable[[int, int], None],
    threads: int | None,
) -> None:
    """Write `target` from the GGUF file `source`. `progress(tensors begun, tensors)`. Same input, same bytes.

    Raises BadRecipe (an override or imatrix that fits no tensor, no imatrix where one is needed, rows that
    fit no block of the type), DiskFull or BuildFailed.
    """
    if recipe.overrides and recipe.type in FLOAT_TYPES:
        raise BadRecipe(f"{recipe.type} keeps every tensor as it is and takes no overrides")
    importance = read_imatrix(Path(recipe.imatrix)) if recipe.imatrix else {}
    if recipe.overrides or importance:
        _check_names(_tensor_names(source), recipe, importance)
    params = _params(recipe, importance, threads)

    def step(piece: str) -> None:
        if match := STEP.match(piece):
            progress(int(match[1]), int(match[2]))

    native, error = library(), Errno()
    with captured(step) as log:
        code = native.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
        met = error.of_disk()
    if code or not is_whole(target):
        reason = _reason(log, (source, target)) if code else CUT
        failure = _failure(reason, recipe, met or _asked(reason, source, target))
        target.unlink(missing_ok=True)
        raise failure


def _asked(reason: str, source: Path, target: Path) -> int:
    """The disk's answer where a write failed, and nothing else."""
    if STREAM not in reason and reason != CUT:
        return 0
    written = target.stat().st_size if target.exists() else 0
    return asked(target.parent, max(FULL, source.stat().st_size - written))


def _tensor_names(source: Path) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in read_header(source).tensors)


def _check_names(names: Sequence[str], recipe: GgufRecipe, importance: Importance) -> None:
    for number, (pattern, _) in enumerate(recipe.overrides):
        if not any(re.search(pattern, name) for name in names):
            raise BadRecipe(f"overrides[{number}]: its pattern matches no tensor of this model")
    if importance and not importance.keys() & set(names):
        raise BadRecipe("the imatrix is of another model: it names none of this model's tensors")


def _params(recipe: GgufRecipe, importance: Importance, threads: int | None) -> Any:
    """llama_model_quantize_params; ctypes keeps the arrays alive that it points to."""
    native = library()
    params = native.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[recipe.type]
    params.nthread = threads or len(os.sched_getaffinity(0))
    params.allow_requantize = True  # from q8_0; which sources may be quantized again is decided above
    params.max_buf_size = BUFFER
    if recipe.overrides:
        params.tt_overrides = _ended(native.llama_model_tensor_override, _overrides(recipe))
    if importance:
        params.imatrix = _ended(native.llama_model_imatrix_data, _matrices(importance))
    return params


def _ended(kind: Any, rows: list[tuple[Any, ...]]) -> Any:
    """A C array closed by an empty element."""
    return (kind * (len(rows) + 1))(*(kind(*row) for row in rows), kind())


def _overrides(recipe: GgufRecipe) -> list[tuple[Any, ...]]:
    return [(pattern.encode(), TENSOR_TYPES[kind].number) for pattern, kind in recipe.overrides]


def _matrices(importance: Importance) -> list[tuple[Any, ...]]:
    single = ctypes.POINTER(ctypes.c_float)
    return [
        (name.encode(), values.ctypes.data_as(single), values.size) for name, values in importance.items()
    ]


def _failure(reason: str, recipe: GgufRecipe, error: int) -> QuantError:
    """`error`: errno of the disk, or 0."""
    if any(word in reason for word in UNFIT):
        return BadRecipe(f"{recipe.type}: {reason}")
    if error in NO_ROOM:
        return DiskFull("the disk of the cache is full")
    if error:
        return BuildFailed(f"the build failed: {os.strerror(error)}")
    if STREAM in reason:
        reason = "a file could not be written"
    return BuildFailed(f"llama.cpp could not make {recipe.type}: {reason}")


def _reason(log: Log, paths: Sequence[Path]) -> str:
    """llama.cpp's last word in one line, without the paths of this machine."""
    words = log.errors[-1] if log.errors else "it gave no reason"
    for path in paths:
        words = words.replace(str(path), path.name)
    return FUNCTION.sub("", words)
