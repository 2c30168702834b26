"""Headers are read exactly, and nothing that lies about itself gets past them."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quant.errors import BadSource
from quant.safetensors_header import HEADER_LIMIT, merge_headers, read_header
from tests.quant.checkpoints import write_raw_safetensors, write_safetensors


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(file: Path) -> str:
    with pytest.raises(BadSource) as caught:
        read_header(file)
    line = str(caught.value)
    assert "\n" not in line
    assert file.name in line
    return line


def write(file: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    write_raw_safetensors(file, json.dumps(header).encode(), data)
    return file


def test_what_the_reference_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a.weight": np.arange(4, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.asarray(7, np.float32),
    }
    save_file(tensors, file, metadata={"x": "y"})
    found = {tensor.name: tensor for tensor in read_header(file)}
    assert found.keys() == tensors.keys()
    data = file.read_bytes()
    for name, value in tensors.items():
        tensor = found[name]
        assert tensor.shape == value.shape
        assert tensor.elements == value.size
        assert data[tensor.start : tensor.end] == value.tobytes()


def test_a_file_without_tensors_is_empty(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "m.safetensors", {}, b"")) == ()


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"t": entry(offsets=(0, 16), shape=(4,))}, "'t' ends at byte"),
        ({"t": entry(offsets=(8, 16))}, "'t' ends at byte"),
        ({"a": entry(), "b": entry(offsets=(4, 8), shape=(1,))}, "'b' overlaps tensor 'a'"),
        ({"a": entry(shape=(1,), offsets=(4, 8))}, "hole before tensor 'a'"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "belong to no tensor"),
        ({"t": entry(dtype="F4_WEIRD")}, "'t' has unknown dtype 'F4_WEIRD'"),
        ({"t": entry(dtype=None)}, "'t' has unknown dtype"),
        ({"t": entry(dtype=["F32"])}, "'t' has unknown dtype"),
        ({"t": entry(shape=(-2,))}, "'t' has an unusable shape"),
        ({"t": entry(shape=(True, 2))}, "'t' has an unusable shape"),
        ({"t": entry(shape="2")}, "'t' has an unusable shape"),
        ({"t": entry(shape=(1,) * 9)}, "'t' has an unusable shape"),
        ({"t": entry(shape=(2**60, 2**60))}, "'t' is F32 of shape"),
        ({"t": entry(shape=(2**64,))}, "'t' has an unusable shape"),
        ({"t": entry(offsets=(0, 2**60))}, "'t' is F32 of shape"),
        ({"t": entry(offsets=(0, 10**400))}, "'t' has unusable offsets"),
        ({"t": entry(offsets=(8, 0))}, "'t' has unusable offsets"),
        ({"t": entry(offsets=(0, 4, 8))}, "'t' has unusable offsets"),
        ({"t": entry(offsets=(0.0, 8.0))}, "'t' has unusable offsets"),
        ({"t": 5}, "'t' is not described"),
        ({"": entry()}, "'' has an unusable name"),
        ({"x" * 600: entry()}, "has an unusable name"),
        ({"evil\n\x1b[31m": entry(dtype="?")}, r"'evil\n\x1b[31m'"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_a_lying_header_is_refused_by_tensor(tmp_path: Path, header: object, what: str) -> None:
    assert what in refused(write(tmp_path / "m.safetensors", header))


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps({"t": entry()})[:-1]
    write_raw_safetensors(tmp_path / "m.safetensors", f"{one}, {one[1:]}}}".encode(), b"\0" * 8)
    assert "'t' twice" in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, HEADER_LIMIT + 1, 10**9, 3, 0, 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    write_raw_safetensors(tmp_path / "m.safetensors", b"{}", length=length)
    assert f"{length:,}" in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"PK\x03\x04" * 8])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "header", [b"[" * 200_000, b'{"a":' * 200_000, b"{'a': 1}", b"\xff\xfe{}", b"9" * 9999]
)
def test_json_that_is_none_or_nested_too_deep_is_refused(tmp_path: Path, header: bytes) -> None:
    write_raw_safetensors(tmp_path / "m.safetensors", header)
    assert "JSON" in refused(tmp_path / "m.safetensors")


def test_pipes_devices_and_missing_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "zero", "folder", "missing"):
        refused(tmp_path / f"{name}.safetensors")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"t": ("F32", (1,), b"\0" * 4)})
    with pytest.raises(BadSource, match=r"a\.safetensors and b\.safetensors both hold tensor 't'"):
        merge_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_reference_refuses_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Mutations of a sound file: we never accept what the reference reader does not, and never crash."""
    file = tmp_path / "m.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int16)}, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([*b'09[]{}",:-aF', 0, 255, data.draw(st.integers(0, 255))]))
    del raw[data.draw(st.integers(len(raw) // 2, len(raw))) :]
    file.write_bytes(raw)
    try:
        with safe_open(file, "numpy") as reference:
            names = set(reference.keys())
    except (SafetensorError, UnicodeDecodeError):
        refused(file)
        return
    with suppress(BadSource):  # stricter than the reference is fine
        assert {tensor.name for tensor in read_header(file)} == names
