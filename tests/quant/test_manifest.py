"""Manifests survive a round trip, and damaged ones are never believed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import DamagedVariant
from quant.manifest import (
    MANIFEST,
    BuilderRecord,
    FileRecord,
    Manifest,
    RecipeRecord,
    SourceRecord,
    decode_manifest,
    encode_manifest,
    read_manifest,
)

SAMPLE = Manifest(
    key="0" * 32,
    source=SourceRecord(id="org/name", revision="abc", digest="1" * 64),
    recipe=RecipeRecord(name="q4_k_m", body={"type": "q4_k_m", "method": "llama"}, digest="2" * 64),
    format="gguf",
    bits_per_weight=4.89,
    bytes=5,
    builder=BuilderRecord(version=1, packages={"gguf": "1", "a": "2"}),
    files=(FileRecord(path="model.gguf", size=5, sha256="3" * 64),),
)


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(encode_manifest(SAMPLE)), **fields}).encode()


def test_reading_undoes_writing(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(encode_manifest(SAMPLE))
    assert read_manifest(tmp_path) == SAMPLE


def test_equal_manifests_are_equal_bytes() -> None:
    turned = RecipeRecord(name="q4_k_m", body={"method": "llama", "type": "q4_k_m"}, digest="2" * 64)
    other = Manifest(
        **{name: getattr(SAMPLE, name) for name in SAMPLE.__struct_fields__} | {"recipe": turned}
    )
    assert encode_manifest(other) == encode_manifest(SAMPLE)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        encode_manifest(SAMPLE)[:-20],
        changed(schema_version=2),
        changed(bytes="5"),
        changed(files=[{"path": "../model.gguf", "size": 5, "sha256": "3" * 64}]),
        changed(files=[{"path": "/etc/passwd", "size": 5, "sha256": "3" * 64}]),
        changed(files=[{"path": "", "size": 5, "sha256": "3" * 64}]),
        changed(files=[{"path": "a\0b", "size": 5, "sha256": "3" * 64}]),
        changed(files=[{"path": "model.gguf", "size": -5, "sha256": "3" * 64}]),
        changed(files=[{"path": "model.gguf", "size": 5, "sha256": "3"}]),
    ],
)
def test_damage_is_typed(raw: bytes) -> None:
    with pytest.raises(DamagedVariant):
        decode_manifest(raw)


def test_no_manifest_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedVariant, match="no readable manifest"):
        read_manifest(tmp_path)


@given(st.integers(0, len(encode_manifest(SAMPLE)) - 1), st.integers(0, 255))
def test_any_byte_may_change(at: int, value: int) -> None:
    raw = bytearray(encode_manifest(SAMPLE))
    raw[at] = value
    try:
        decode_manifest(bytes(raw))
    except DamagedVariant:
        return
