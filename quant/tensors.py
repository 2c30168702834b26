"""Tensors between files and memory: read one by one without mapping, written in one deterministic order.

Files are read, not mapped: a page of a mapping that cannot be read kills the process, and pages that were
read count as its memory.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BufferedReader, FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.files import open_regular, shown
from quant.safetensors_header import TensorInfo, read_header

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "F32": torch.float32,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 16 << 20  # bytes copied at once


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor of its own memory. Raises BadSource naming file and tensor."""
    with open_regular(info.file) as stream:
        return _read(stream, info)


def read_tensors(infos: Mapping[str, TensorInfo], *, finite: bool = False) -> dict[str, Tensor]:
    """By the same names; each file is opened once. Raises BadSource, if `finite` also for NaN or infinity."""
    found: dict[str, Tensor] = {}
    for file in {info.file for info in infos.values()}:
        with open_regular(file) as stream:
            found |= {name: _read(stream, info) for name, info in infos.items() if info.file == file}
    for name, tensor in found.items() if finite else ():
        _require_finite(infos[name], tensor)
    return {name: found[name] for name in infos}


def require_finite_in_file(info: TensorInfo) -> None:
    """Look at all numbers of a tensor, some at a time. Raises BadSource naming file and tensor."""
    with open_regular(info.file) as stream:
        for start in range(info.start, info.end, CHUNK):
            part = replace(info, start=start, end=min(start + CHUNK, info.end), shape=(-1,))
            _require_finite(info, _read(stream, part))


def _require_finite(info: TensorInfo, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise BadSource(f"{info.said} has NaN or infinite values")


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of a file of ours."""
    return read_tensors({info.name: info for info in read_header(file)})


def read_rows(info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """[len(rows), columns] of a matrix in a file, without the rest of it."""
    width = info.shape[1] * (info.end - info.start) // max(1, info.elements)
    data = torch.empty((len(rows), width), dtype=torch.uint8)
    with open_regular(info.file) as stream:
        for place, row in enumerate(rows):
            stream.seek(info.start + row * width)
            _fill(stream, data[place], info)
    return data.view(DTYPES[info.dtype])


def _read(stream: BufferedReader, info: TensorInfo) -> Tensor:
    data = torch.empty(info.end - info.start, dtype=torch.uint8)
    stream.seek(info.start)
    _fill(stream, data, info)
    return data.view(DTYPES[info.dtype]).view(info.shape)


def _fill(stream: BufferedReader, data: Tensor, info: TensorInfo) -> None:
    left = bytes_of(data)
    while left:
        count = stream.readinto(left)
        if not count:
            raise BadSource(f"{info.file.name} is truncated: it ends inside tensor {shown(info.name)}")
        left = left[count:]


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """On the CPU. Raises BadSource where a number becomes infinite."""
    changed = value.detach().to("cpu", dtype)
    if not bool(torch.isfinite(changed).all()):
        raise BadSource(
            f"tensor {shown(name)} has numbers that {str(dtype).removeprefix('torch.')} cannot hold"
        )
    return changed


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, synced; equal tensors in equal order give equal bytes."""
    entries = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    with file.open("wb", buffering=0) as stream:
        stream.write(header_of(entries))
        for tensor in tensors.values():
            write_all(stream, bytes_of(tensor))
        os.fsync(stream.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory, where it lies in it without gaps."""
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def header_of(entries: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Length and JSON of a safetensors header: (dtype, shape, bytes) by name, data in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_all(stream: FileIO, data: memoryview) -> None:
    while data:
        written = stream.write(data)
        data = data[written:]


def copy_data(infos: Iterable[TensorInfo], target: FileIO) -> None:
    """Append the bytes of these tensors, neighbours in a file at once."""
    for file, start, end in _joined(infos):
        with open_regular(file) as source:
            _copy(source.fileno(), target.fileno(), start, end, file)


def _joined(infos: Iterable[TensorInfo]) -> list[tuple[Path, int, int]]:
    pieces: list[tuple[Path, int, int]] = []
    for info in infos:
        if pieces and pieces[-1][0] == info.file and pieces[-1][2] == info.start:
            pieces[-1] = (info.file, pieces[-1][1], info.end)
        else:
            pieces.append((info.file, info.start, info.end))
    return pieces


def _copy(source: int, target: int, start: int, end: int, file: Path) -> None:
    while start < end:
        count = os.sendfile(target, source, start, min(CHUNK, end - start))
        if not count:
            raise BadSource(f"{file.name} became shorter while it was read")
        start += count
