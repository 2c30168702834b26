"""Variants broken on purpose, in ways that hashes do not show: the manifest is written anew."""

import hashlib
from pathlib import Path

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


def swap_scales(folder: Path, one: str, other: str) -> None:
    """Two Q8_0 matrices of one shape exchange the scales of all their blocks (2 of every 34 bytes)."""
    by_name = {tensor.name: tensor for tensor in _tensors(folder)}
    first, second = by_name[one], by_name[other]
    assert first.shape == second.shape
    data = bytearray((folder / "model.gguf").read_bytes())
    for offset in range(0, first.end - first.start, 34):
        a, b = first.start + offset, second.start + offset
        data[a : a + 2], data[b : b + 2] = data[b : b + 2], data[a : a + 2]
    _publish(folder, bytes(data))


def _tensors(folder: Path) -> tuple[GgufTensor, ...]:
    return read_header(folder / "model.gguf").tensors


def _publish(folder: Path, data: bytes) -> None:
    (folder / "model.gguf").write_bytes(data)
    manifest = read_manifest(folder)
    digest = hashlib.sha256(data).hexdigest()
    files = tuple(
        replace(file, sha256=digest) if file.path == "model.gguf" else file for file in manifest.files
    )
    (folder / MANIFEST).write_bytes(encode_manifest(replace(manifest, files=files)))
