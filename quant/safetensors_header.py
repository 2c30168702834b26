"""Headers of safetensors files, read without reading a weight.

The layout (safetensors README): 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape,
data_offsets}}, then the data. Offsets count from the end of the header and tile the data without a hole.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from quant.errors import BadSource
from quant.files import open_regular, shown

HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
NAME_LIMIT = 512
DIMENSIONS = 8
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    file: Path
    start: int  # first byte, counted from the start of the file
    end: int  # one past the last

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def said(self) -> str:
        """How errors begin that are about it."""
        return f"{self.file.name}: tensor {shown(self.name)}"


class _Object:
    """A JSON object that keeps repeated keys."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        self.items = items


def read_header(file: Path) -> tuple[TensorInfo, ...]:
    """All tensors of one file in the order of their data. Raises BadSource naming file and tensor."""
    raw, length = _read_raw(file)
    base = 8 + len(raw)
    tensors = [
        _tensor(file, name, entry, base) for name, entry in _parse(file, raw) if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_tiling(file, tensors, base, length)
    return tuple(tensors)


def merge_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Tensors of all files by name. Raises BadSource where a name occurs in two files."""
    merged: dict[str, TensorInfo] = {}
    for file in files:
        for tensor in read_header(file):
            if other := merged.get(tensor.name):
                raise BadSource(f"{other.file.name} and {file.name} both hold tensor {shown(tensor.name)}")
            merged[tensor.name] = tensor
    return merged


def _read_raw(file: Path) -> tuple[bytes, int]:
    """(JSON of the header, length of the file)."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        claimed = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= claimed <= min(size - 8, HEADER_LIMIT):
            raise BadSource(
                f"{file.name} is truncated or not safetensors: {size:,} bytes, of which its header claims "
                f"{claimed:,}"
            )
        raw = stream.read(claimed)
    if len(raw) < claimed:
        raise BadSource(f"{file.name} ends inside its header")
    return raw, size


def _parse(file: Path, raw: bytes) -> list[tuple[str, Any]]:
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{file.name} has a header that is not valid JSON") from error
    if not isinstance(parsed, _Object):
        raise BadSource(f"{file.name} has a header that is not a JSON object")
    seen: set[str] = set()
    for name, _ in parsed.items:
        if name in seen:
            raise BadSource(f"{file.name} names tensor {shown(name)} twice")
        seen.add(name)
    return parsed.items


def _tensor(file: Path, name: str, entry: object, base: int) -> TensorInfo:
    where = f"{file.name}: tensor {shown(name)}"
    if not 0 < len(name) <= NAME_LIMIT:
        raise BadSource(f"{where} has an unusable name")
    if not isinstance(entry, _Object):
        raise BadSource(f"{where} is not described by an object")
    fields = dict(entry.items)
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadSource(f"{where} has unknown dtype {shown(dtype)}")
    if not _is_counts(shape) or len(shape) > DIMENSIONS:
        raise BadSource(f"{where} has an unusable shape {shown(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadSource(f"{where} has unusable offsets {shown(offsets)}")
    start, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != needed:
        raise BadSource(
            f"{where} is {dtype} of shape {shown(shape)}: {needed:,} bytes, but it has {end - start:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, base + start, base + end)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_tiling(file: Path, tensors: list[TensorInfo], base: int, size: int) -> None:
    for tensor in tensors:
        if tensor.end > size:
            raise BadSource(
                f"{file.name} is truncated: tensor {shown(tensor.name)} ends at byte {tensor.end:,} "
                f"of {size:,}"
            )
    if tensors and tensors[0].start != base:
        raise BadSource(f"{file.name}: there is a hole before tensor {shown(tensors[0].name)}")
    for left, right in pairwise(tensors):
        if left.end != right.start:
            what = "overlaps" if left.end > right.start else "leaves a hole after"
            raise BadSource(f"{file.name}: tensor {shown(right.name)} {what} tensor {shown(left.name)}")
    if (tensors[-1].end if tensors else base) != size:
        raise BadSource(f"{file.name} has bytes that belong to no tensor")
