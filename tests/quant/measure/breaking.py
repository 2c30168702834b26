"""Variants broken on purpose, in ways that hashes do not show: the manifest is written anew."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from quant.gguf.header import GgufTensor, read_header
from quant.manifest import MANIFEST, encode_manifest, read_manifest


def zero_block(folder: Path, block: int) -> None:
    """All matrices of one decoder block of a GGUF variant become 0."""
    tensors = [one for one in _tensors(folder) if one.name.startswith(f"blk.{block}.") and len(one.shape) > 1]
    data = bytearray((folder / "model.gguf").read_bytes())
    for tensor in tensors:
        data[tensor.start : tensor.end] = bytes(tensor.end - tensor.start)
    _publish(folder, bytes(data))


# By type: bytes of a block, and where in it the half-precision scales lie (ggml/src/ggml-common.h).
SCALES = {"q8_0": (34, 0, 2), "q4_0": (18, 0, 2), "q4_k": (144, 0, 4), "q6_k": (210, 208, 210)}


def swap_scales(folder: Path, one: str, other: str) -> None:
    """Two matrices of one shape and type exchange the scales of all their blocks."""
    by_name = {tensor.name: tensor for tensor in _tensors(folder)}
    first, second = by_name[one], by_name[other]
    assert (first.shape, first.type) == (second.shape, second.type)
    size, begin, end = SCALES[first.type.lower()]
    data = bytearray((folder / "model.gguf").read_bytes())
    for offset in range(0, first.end - first.start, size):
        a, b = (slice(start + offset + begin, start + offset + end) for start in (first.start, second.start))
        data[a], data[b] = data[b], data[a]
    _publish(folder, bytes(data))


def zero_bytes(folder: Path, name: str, count: int) -> None:
    """The first bytes of one matrix become 0: a block of its numbers."""
    (tensor,) = (one for one in _tensors(folder) if one.name == name)
    data = bytearray((folder / "model.gguf").read_bytes())
    data[tensor.start : tensor.start + count] = bytes(count)
    _publish(folder, bytes(data))


def swap_bytes(folder: Path, one: str, other: str) -> None:
    """Two tensors of one shape and type change places."""
    by_name = {tensor.name: tensor for tensor in _tensors(folder)}
    data = bytearray((folder / "model.gguf").read_bytes())
    a, b = (slice(by_name[name].start, by_name[name].end) for name in (one, other))
    data[a], data[b] = data[b], data[a]
    _publish(folder, bytes(data))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The tensors of a checkpoint's only file, changed in place by `change`."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    _rehash(folder, path.name, path.read_bytes())


def change_file(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    data = change((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    _rehash(folder, name, data)


def swap_tokens(data: bytes) -> bytes:
    """Of a tokenizer.json: two words exchange their numbers."""
    tokenizer = json.loads(data)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[600:602]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(tokenizer).encode()


def _tensors(folder: Path) -> tuple[GgufTensor, ...]:
    return read_header(folder / "model.gguf").tensors


def _publish(folder: Path, data: bytes) -> None:
    (folder / "model.gguf").write_bytes(data)
    _rehash(folder, "model.gguf", data)


def _rehash(folder: Path, name: str, data: bytes) -> None:
    manifest = read_manifest(folder)
    digest = hashlib.sha256(data).hexdigest()
    files = tuple(
        replace(file, sha256=digest, size=len(data)) if file.path == name else file for file in manifest.files
    )
    (folder / MANIFEST).write_bytes(encode_manifest(replace(manifest, files=files)))
