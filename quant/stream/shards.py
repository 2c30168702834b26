"""The variant's weights as one safetensors file, or several with an index, from pieces on the disk."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from quant.checkpoint import INDEX, WEIGHTS
from quant.safetensors_header import TensorInfo
from quant.tensors import copy_data, header_of

SHARD_BYTES = 5_000_000_000  # as others do; a larger tensor is alone in its file


def write_shards(tensors: Sequence[TensorInfo], folder: Path, progress: Callable[[int, int], None]) -> None:
    """Equal tensors in equal order give equal files. `progress(bytes written, bytes in all)`."""
    parts = _parts(tensors)
    total, done = sum(_size(tensor) for tensor in tensors), 0
    names: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = WEIGHTS if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        _write(part, folder / file)
        names |= dict.fromkeys((tensor.name for tensor in part), file)
        done += sum(_size(tensor) for tensor in part)
        progress(done, total)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _parts(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    parts: list[list[TensorInfo]] = []
    room = 0
    for tensor in tensors:
        if _size(tensor) > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(tensor)
        room -= _size(tensor)
    return parts


def _size(tensor: TensorInfo) -> int:
    return tensor.end - tensor.start


def _write(tensors: Sequence[TensorInfo], file: Path) -> None:
    entries = {tensor.name: (tensor.dtype, tensor.shape, _size(tensor)) for tensor in tensors}
    with file.open("wb", buffering=0) as stream:
        stream.write(header_of(entries))
        copy_data(tensors, stream)
        os.fsync(stream.fileno())
