"""Headers of GGUF files (version 2 and 3), read and bounds-checked before any native reader sees them.

Source: ggml's GGUF document and the checks in llama.cpp's ggml/src/gguf.cpp, all of which are made here.
"""

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.files import open_regular, shown
from quant.ggml import FILE_TYPE_NAMES, TENSOR_TYPE_NAMES, TENSOR_TYPES
from quant.gguf.parts import siblings

STRING_LIMIT = 1 << 30  # bytes
KEY_LIMIT = 65_535  # bytes
NAME_LIMIT = 63  # bytes of a tensor's name
DIMENSIONS = 4
SMALL_ARRAY = 64  # elements; longer ones are kept only when asked for
_SMALLEST_PAIR = 8 + 1 + 4 + 1  # bytes of a key-value pair: key length, key, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8  # name length, name, dimensions, type, offset
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    type: str  # a key of quant.ggml.TENSOR_TYPES
    shape: tuple[int, ...]  # fastest dimension first, as the file has it
    start: int  # first byte, counted from the start of the file, or part, that holds it
    end: int  # one past the last

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    version: int
    metadata: Mapping[str, Any]  # str, int, float, bool, list; a long array nobody asked for is None
    tensors: tuple[GgufTensor, ...]
    bytes: int  # of the file, or of all parts together

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def file_type(self) -> str:
        """ "q4_0" and the like; "unknown" where the file does not say."""
        number = self.metadata.get("general.file_type")
        return FILE_TYPE_NAMES.get(number, "unknown") if isinstance(number, int) else "unknown"

    @property
    def bits_per_weight(self) -> float:
        elements = sum(tensor.elements for tensor in self.tensors)
        return 8 * sum(tensor.end - tensor.start for tensor in self.tensors) / max(elements, 1)


def read_header(file: Path, *, keep: Callable[[str], bool] = lambda key: False) -> GgufHeader:
    """Metadata and tensor places of `file`; `keep(key)` asks for a long array.

    Of a split model the first part is named, which has the metadata; the tensors are those of all parts.
    Raises BadSource.
    """
    first = _read_file(file, keep)
    count, number = _part(first.metadata)
    if number:
        raise BadSource(f"{file.name}: this is part {number + 1} of {count} of a split model; name the first")
    if count > 1:
        return _joined(file.name, [first, *(_read_part(file, at, count) for at in range(1, count))])
    if "general.architecture" not in first.metadata:
        raise BadSource(f"{file.name}: metadata 'general.architecture' is missing")
    return first


def _read_file(file: Path, keep: Callable[[str], bool]) -> GgufHeader:
    with open_regular(file) as stream:
        reader = _Reader(file.name, stream)
        version, tensor_count, pair_count = _preamble(reader)
        metadata = _metadata(reader, pair_count, keep)
        infos = [_tensor_info(reader) for _ in range(tensor_count)]
    _check_metadata(reader, metadata)
    placed = _place(reader, infos, metadata.get("general.alignment", 32))
    return GgufHeader(version, metadata, placed, reader.size)


def _part(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """(parts of the model, number of this one from 0)."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    whole = type(count) is not int or type(number) is not int or count < 2
    return (1, 0) if whole else (count, number)


def _read_part(first: Path, number: int, count: int) -> GgufHeader:
    """llama.cpp finds the others by the name of the first. Raises BadSource."""
    names = siblings(first.name, [one.name for one in first.parent.iterdir()])
    if len(names) != count:
        wanted = f"-00001-of-{count:05}.gguf"
        raise BadSource(f"{first.name}: the first of {count} parts must have a name that ends with {wanted}")
    part = _read_file(first.with_name(names[number]), lambda key: False)
    if _part(part.metadata) != (count, number):
        raise BadSource(f"{names[number]}: this is not part {number + 1} of {count}")
    return part


def _joined(name: str, parts: Sequence[GgufHeader]) -> GgufHeader:
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    if "general.architecture" not in parts[0].metadata:
        raise BadSource(f"{name}: metadata 'general.architecture' is missing")
    claimed = parts[0].metadata.get("split.tensors.count")
    if len({tensor.name for tensor in tensors}) != len(tensors) or claimed != len(tensors):
        raise BadSource(f"{name}: its parts do not hold the {shown(claimed)} tensors that it names")
    return GgufHeader(parts[0].version, parts[0].metadata, tensors, sum(part.bytes for part in parts))


class _Reader:
    """Little-endian values, none of which may lie beyond the end of the file."""

    def __init__(self, name: str, stream: BufferedReader) -> None:
        self.name = name
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.at = 0

    def fail(self, what: str) -> BadSource:
        return BadSource(f"{self.name}: {what}")

    def require(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"{what} needs {count:,} bytes, but {self.size - self.at:,} are left of the file")

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        data = self.stream.read(count)
        if len(data) < count:
            raise self.fail(f"the file ends inside {what}")
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.require(count, what)
        self.stream.seek(count, os.SEEK_CUR)
        self.at += count

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack(self.take(kind.size, what))[0]

    def length(self, what: str, limit: int) -> int:
        count: int = self.scalar(_U64, what)
        if count > limit:
            raise self.fail(f"{what} claims {count:,} bytes, more than {limit:,}")
        return count

    def text(self, what: str, limit: int = STRING_LIMIT) -> str:
        raw = self.take(self.length(what, limit), what)
        return raw.decode("utf-8", "surrogateescape")  # vocabularies hold broken UTF-8


def _preamble(reader: _Reader) -> tuple[int, int, int]:
    """(version, tensors, key-value pairs)."""
    if reader.take(4, "the magic number") != b"GGUF":
        raise reader.fail("this is no GGUF file")
    version: int = reader.scalar(_U32, "the version")
    if version not in {2, 3}:
        order = ", or the file is big-endian" if version & 0xFFFF == 0 else ""
        raise reader.fail(f"GGUF version {version} is not supported (2 and 3 are){order}")
    tensors: int = reader.scalar(_U64, "the tensor count")
    pairs: int = reader.scalar(_U64, "the metadata count")
    left = reader.size - reader.at
    if tensors * _SMALLEST_TENSOR + pairs * _SMALLEST_PAIR > left:
        raise reader.fail(f"{tensors:,} tensors and {pairs:,} metadata keys do not fit {left:,} bytes")
    return version, tensors, pairs


def _metadata(reader: _Reader, count: int, keep: Callable[[str], bool]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = reader.text(f"metadata key {index}", KEY_LIMIT)
        if not key or key in metadata:
            raise reader.fail(f"metadata key {shown(key)} is empty or there twice")
        what = f"metadata {shown(key)}"
        metadata[key] = _value(reader, reader.scalar(_U32, what), what, keep(key))
    return metadata


def _value(reader: _Reader, kind: int, what: str, kept: bool) -> Any:
    if kind == _STRING:
        return reader.text(what)
    if kind == _ARRAY:
        return _array(reader, what, kept)
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind], what)
    raise reader.fail(f"{what} has unknown type {kind}")


def _array(reader: _Reader, what: str, kept: bool) -> list[Any] | None:
    kind: int = reader.scalar(_U32, what)
    count: int = reader.scalar(_U64, what)
    kept = kept or count <= SMALL_ARRAY
    if kind == _STRING:
        reader.require(8 * count, what)
        return _strings(reader, count, what, kept)
    if kind not in _SCALARS:
        raise reader.fail(f"{what} is an array of unknown type {kind}")
    scalar = _SCALARS[kind]
    if not kept:
        reader.skip(count * scalar.size, what)
        return None
    raw = reader.take(count * scalar.size, what)
    return [value for (value,) in scalar.iter_unpack(raw)]


def _strings(reader: _Reader, count: int, what: str, kept: bool) -> list[str] | None:
    if kept:
        return [reader.text(what) for _ in range(count)]
    for _ in range(count):
        reader.skip(reader.length(what, STRING_LIMIT), what)
    return None


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def _tensor_info(reader: _Reader) -> _Info:
    name = reader.text("a tensor's name", NAME_LIMIT)
    what = f"tensor {shown(name)}"
    dimensions: int = reader.scalar(_U32, what)
    if dimensions > DIMENSIONS:
        raise reader.fail(f"{what} has {dimensions} dimensions, more than {DIMENSIONS}")
    shape = tuple(reader.scalar(_U64, what) for _ in range(dimensions))
    number: int = reader.scalar(_U32, what)
    if number not in TENSOR_TYPE_NAMES:
        raise reader.fail(f"{what} has unknown type {number}")
    kind = TENSOR_TYPE_NAMES[number]
    block = TENSOR_TYPES[kind]
    elements = math.prod(shape)
    if max((*shape, elements)) >= 1 << 63 or (shape[0] if shape else 1) % block.elements:
        raise reader.fail(f"{what} of type {kind} has an impossible shape {shown(list(shape))}")
    size = elements // block.elements * block.bytes
    return _Info(name, kind, shape, reader.scalar(_U64, what), size)


def _check_metadata(reader: _Reader, metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture", "of the first part")
    if not isinstance(architecture, str) or not architecture:
        raise reader.fail("metadata 'general.architecture' is missing")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.fail(f"metadata 'general.alignment' is {shown(alignment)}, no power of two")


def _place(reader: _Reader, infos: list[_Info], alignment: int) -> tuple[GgufTensor, ...]:
    """Tensors lie one after the other in the order of the header, each padded to `alignment`."""
    base = _padded(reader.at, alignment)
    expected = 0
    names: set[str] = set()
    placed: list[GgufTensor] = []
    for info in infos:
        if info.name in names:
            raise reader.fail(f"tensor {shown(info.name)} is there twice")
        names.add(info.name)
        if info.offset != expected:
            raise reader.fail(f"tensor {shown(info.name)} starts at {info.offset:,}, not at {expected:,}")
        start, end = base + info.offset, base + info.offset + info.bytes
        if end > reader.size:
            raise reader.fail(
                f"the file is truncated: tensor {shown(info.name)} ends at byte {end:,} of {reader.size:,}"
            )
        placed.append(GgufTensor(info.name, info.type, info.shape, start, end))
        expected = _padded(expected + info.bytes, alignment)
    return tuple(placed)


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
