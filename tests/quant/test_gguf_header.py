"""GGUF headers are read as gguf-py writes them, and hostile ones never reach a native reader."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.errors import BadSource
from quant.ggml import FILE_TYPES, TENSOR_TYPES
from quant.gguf.header import read_header

ARCH = ("general.architecture", 8, b"llama")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: Any) -> bytes:
    head = text(key.encode()) + struct.pack("<I", kind)
    match kind:
        case 8:
            return head + text(value)
        case 4:
            return head + struct.pack("<I", value)
        case _:
            return head + bytes(value)


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack("<I", count) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def gguf_file(
    path: Path,
    *,
    pairs: tuple[tuple[str, int, Any], ...] = (ARCH,),
    tensors: tuple[bytes, ...] = (tensor(),),
    data: bytes = b"\0" * 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    claimed = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *claimed)
    raw = head + b"".join(pair(*one) for one in pairs) + b"".join(tensors)
    path.write_bytes(raw + b"\0" * (-len(raw) % 32) + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(BadSource) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.isprintable()
    assert path.name in line
    return line


def write_reference(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES["q8_0"])
    writer.add_block_count(3)
    writer.add_float32("llama.x", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("small", [1, 2, 3])
    writer.add_token_list([f"tok{n}" for n in range(200)])
    writer.add_token_scores([float(n) for n in range(200)])
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(96, dtype=np.float32).reshape(3, 32),
        "b": np.arange(5, dtype=np.float16),
    }
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    quantized = gguf.quants.quantize(tensors["a"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**tensors, "q": quantized}


def test_what_the_reference_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = write_reference(path)
    header = read_header(path)
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.file_type == "q8_0"
    assert header.metadata["llama.block_count"] == 3
    assert header.metadata["llama.x"] == 0.5
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["small"] == [1, 2, 3]
    assert header.metadata["tokenizer.ggml.tokens"] is None
    assert header.metadata["tokenizer.ggml.scores"] is None
    data = path.read_bytes()
    for tensor in header.tensors:
        assert data[tensor.start : tensor.end] == tensors[tensor.name].tobytes()
    assert [(one.name, one.type, one.shape) for one in header.tensors] == [
        ("a", "f32", (32, 3)),
        ("b", "f16", (5,)),
        ("q", "q8_0", (32, 3)),
    ]
    bits = 8 * sum(value.nbytes for value in tensors.values()) / (96 + 5 + 96)
    assert header.bits_per_weight == pytest.approx(bits)


def test_long_arrays_come_when_they_are_asked_for(tmp_path: Path) -> None:
    write_reference(tmp_path / "m.gguf")
    header = read_header(tmp_path / "m.gguf", keep=lambda key: key == "tokenizer.ggml.tokens")
    assert header.metadata["tokenizer.ggml.tokens"] == [f"tok{n}" for n in range(200)]
    assert header.metadata["tokenizer.ggml.scores"] is None


def test_blocks_have_the_sizes_of_the_reference() -> None:
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # gguf-py keeps a size that ggml gave up; no file holds such tensors
            ours = TENSOR_TYPES[kind.name.lower()]
            assert (ours.number, ours.elements, ours.bytes) == (kind.value, elements, size)


def test_file_types_have_the_numbers_of_the_reference() -> None:
    for kind in gguf.LlamaFileType:
        name = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
        if name not in {"guessed", "nvfp4"}:
            assert FILE_TYPES[name] == kind.value


def test_a_file_that_does_not_say_its_type_is_unknown(tmp_path: Path) -> None:
    assert read_header(gguf_file(tmp_path / "m.gguf")).file_type == "unknown"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"version": 1}, "version 1 is not supported"),
        ({"version": 3 << 24}, "big-endian"),
        ({"counts": (10**9, 1)}, "1,000,000,000 tensors"),
        ({"counts": (2**63, 1)}, "do not fit"),
        ({"counts": (1, 2**60)}, "do not fit"),
        ({"tensors": (tensor(), tensor(offset=32)), "data": b"\0" * 64}, "'t' is there twice"),
        ({"pairs": ()}, "'general.architecture' is missing"),
        ({"pairs": (("general.architecture", 4, 7),)}, "'general.architecture' is missing"),
        ({"pairs": (ARCH, ARCH)}, "there twice"),
        ({"pairs": (ARCH, ("", 4, 1))}, "is empty"),
        ({"pairs": (ARCH, ("k", 99, b""))}, "'k' has unknown type 99"),
        ({"pairs": (ARCH, ("k", 9, struct.pack("<IQ", 9, 1)))}, "'k' is an array of unknown type 9"),
        ({"pairs": (ARCH, ("k", 9, struct.pack("<IQ", 4, 2**62)))}, "'k' needs"),
        ({"pairs": (ARCH, ("k", 9, struct.pack("<IQ", 8, 2**61)))}, "'k' needs"),
        ({"pairs": (ARCH, ("k", 9, struct.pack("<IQQ", 8, 1, 2**60)))}, "'k' claims"),
        ({"pairs": (ARCH, ("k", 9, struct.pack("<IQQ", 8, 1, 2**29)))}, "'k' needs"),
        ({"pairs": (ARCH, ("general.alignment", 4, 0))}, "no power of two"),
        ({"pairs": (ARCH, ("general.alignment", 4, 24))}, "no power of two"),
        ({"pairs": (ARCH, ("general.alignment", 8, b"32"))}, "no power of two"),
        ({"pairs": (ARCH, ("split.count", 4, 3))}, "the first of 3 parts must have a name"),
        ({"pairs": (ARCH, ("split.count", 4, 3), ("split.no", 4, 1))}, "part 2 of 3 of a split model"),
        ({"pairs": (ARCH, ("split.count", 4, 2**31))}, "the first of 2147483648 parts must have a name"),
        ({"tensors": (tensor(name=b"n" * 64),)}, "more than 63"),
        ({"tensors": (tensor(kind=4),)}, "'t' has unknown type 4"),
        ({"tensors": (tensor(kind=2**31),)}, "'t' has unknown type"),
        ({"tensors": (tensor(kind=2),)}, "'t' of type q4_0 has an impossible shape"),
        ({"tensors": (tensor(shape=(2**60, 2**60)),)}, "'t' of type f32 has an impossible shape"),
        ({"tensors": (tensor(shape=(2**63, 0)),)}, "'t' of type f32 has an impossible shape"),
        ({"tensors": (tensor(shape=(2**40,)),)}, "'t' ends at byte"),
        ({"tensors": (tensor(dims=5),)}, "5 dimensions"),
        ({"tensors": (tensor(dims=2**31),)}, "dimensions"),
        ({"tensors": (tensor(offset=32),)}, "'t' starts at 32, not at 0"),
        ({"tensors": (tensor(), tensor(b"u"))}, "'u' starts at 0, not at 32"),
        ({"tensors": (tensor(), tensor(b"u", offset=2**60))}, "'u' starts at"),
        ({"tensors": (tensor(),), "data": b"\0" * 8}, "truncated: tensor 't'"),
    ],
)
def test_a_lying_header_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], what: str) -> None:
    assert what in refused(gguf_file(tmp_path / "m.gguf", **fields))


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"GGML" + b"\0" * 60, b"\0" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    end = read_header(tmp_path / "m.gguf").tensors[-1].end
    for length in [*range(0, 400, 7), *range(end - 40, end)]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        refused(tmp_path / "cut.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutations_are_refused_or_read_within_bounds(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = gguf_file(
        tmp_path / "m.gguf",
        pairs=(ARCH, ("a", 4, 1), ("s", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"yz"))),
        tensors=(tensor(), tensor(b"q", (32, 2), 8, 32)),
        data=b"\0" * 128,
    )
    raw = bytearray(path.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except BadSource:
        return
    for one in header.tensors:
        block = TENSOR_TYPES[one.type]
        assert one.end - one.start == one.elements * block.bytes // block.elements
        assert 0 < one.start <= one.end <= len(raw)
