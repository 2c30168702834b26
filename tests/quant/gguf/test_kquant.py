"""Quantizing: every type, types by tensor, importance matrices, and reasons of failures in one line."""

import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers

from quant.errors import BadRecipe, BuildFailed
from quant.ggml import NEED_IMATRIX
from quant.gguf.imatrix import read_imatrix
from quant.gguf.kquant import quantize
from quant.gguf.native import library
from quant.gguf.outcome import Errno
from quant.recipe import GGUF_PRESETS, GgufRecipe
from tests.quant.gguf.support import checkpoint, converted, llama_greedy, llama_logits, reference, worst

PROMPT = [1, 50, 60, 70]


@pytest.fixture(scope="module")
def bases(
    tiny_chat: Path, shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            converted(tiny_chat if name == "tiny-chat" else shared(f"models/{name}"), path, "bf16")
        return path

    return base


def quantized(base: Path, target: Path, recipe: GgufRecipe) -> dict[str, str]:
    """Types by tensor."""
    seen: list[tuple[int, int]] = []
    quantize(base, target, recipe, progress=lambda done, total: seen.append((done, total)), threads=2)
    reader = gguf.GGUFReader(target) if recipe.type != "q2_0" else None  # gguf 0.19 does not know q2_0
    total = seen[-1][1]
    assert seen == [(step, total) for step in range(1, total + 1)]
    return {} if reader is None else {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


@pytest.mark.parametrize("kind", sorted(GGUF_PRESETS.keys() - NEED_IMATRIX))
def test_every_type_builds_and_generates(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "any.gguf"
    quantized(bases("tiny-chat"), target, GGUF_PRESETS[kind])
    assert np.isfinite(llama_logits(target, PROMPT)).all()
    assert len(llama_greedy(target, PROMPT, 8)) == 8


@pytest.mark.parametrize("kind", sorted(GGUF_PRESETS.keys() - NEED_IMATRIX))
def test_rows_of_odd_lengths(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """64 and 172 columns fit no k-quant: llama.cpp falls back, or the recipe is refused."""
    target = tmp_path / "odd.gguf"
    if kind == "q1_0":  # blocks of 128, and llama.cpp has no fallback
        with pytest.raises(BadRecipe, match="q1_0: no tensor type fallback"):
            quantized(bases("stories260K"), target, GGUF_PRESETS[kind])
        return
    quantized(bases("stories260K"), target, GGUF_PRESETS[kind])
    assert np.isfinite(llama_logits(target, PROMPT)).all()
    assert len(llama_greedy(target, PROMPT, 8)) == 8


def test_the_same_bytes_twice_and_on_any_number_of_threads(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    for threads in (1, 2, None):
        quantize(
            bases("tiny-chat"),
            tmp_path / f"{threads}.gguf",
            GGUF_PRESETS["q6_k"],
            progress=lambda _done, _total: None,
            threads=threads,
        )
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "None.gguf").read_bytes()


def test_windowed_layers_survive_quantizing(tmp_path: Path) -> None:
    config: dict[str, Any] = {"sliding_window": 9}
    folder = checkpoint(tmp_path / "source", transformers.MistralForCausalLM, **config)
    base = converted(folder, tmp_path / "base.gguf")
    quantized(base, tmp_path / "f16.gguf", GGUF_PRESETS["f16"])
    tokens = list(range(30))
    assert worst(llama_logits(tmp_path / "f16.gguf", tokens), reference(folder, tokens)) <= 1e-2


def test_types_by_tensor(bases: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = GgufRecipe(type="q8_0", overrides=(("ffn_down", "q4_0"), (r"blk\.0\.attn_v", "f16")))
    types = quantized(bases("tiny-chat"), tmp_path / "mixed.gguf", recipe)
    assert {kind for name, kind in types.items() if "ffn_down" in name} == {"Q4_0"}
    assert types["blk.0.attn_v.weight"] == "F16"
    assert types["blk.1.attn_q.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            GgufRecipe(type="q4_k_m", overrides=(("no_such_tensor", "q8_0"),)),
            r"overrides\[0\].*matches no tensor",
        ),
        (GgufRecipe(type="f16", overrides=(("ffn_down", "q8_0"),)), "no overrides"),
        (GgufRecipe(type="iq2_xxs"), "imatrix"),
        (GgufRecipe(type="q4_k_m", overrides=(("ffn_down", "iq1_s"),)), "imatrix"),
    ],
    ids=["no tensor", "float", "no imatrix", "override without imatrix"],
)
def test_recipes_that_fit_not_are_refused(
    recipe: GgufRecipe, words: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=words) as caught:
        quantized(bases("tiny-chat"), tmp_path / "no.gguf", recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "no.gguf").exists()


def importance(base: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    rng = np.random.default_rng(1)
    return {
        tensor.name: rng.random(int(tensor.shape[0]), np.float32) + np.float32(0.01)
        for tensor in gguf.GGUFReader(base).tensors
        if len(tensor.shape) == 2
    }


def records(entries: dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]], calls: int) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, values in entries.items():
        raw = name.encode()
        parts += [
            struct.pack("<i", len(raw)),
            raw,
            struct.pack("<ii", calls, values.size),
            (values * calls).tobytes(),
        ]
    return b"".join([*parts, struct.pack("<i", 7), struct.pack("<i", 4), b"text"])


def as_gguf(
    entries: dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]], path: Path, count: float
) -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values[None, :] * np.float32(count))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_both_layouts_of_an_imatrix_say_the_same(bases: Callable[[str], Path], tmp_path: Path) -> None:
    entries = importance(bases("tiny-chat"))
    (tmp_path / "old.dat").write_bytes(records(entries, 8))
    as_gguf(entries, tmp_path / "new.gguf", 64.0)
    for name in ("old.dat", "new.gguf"):
        read = read_imatrix(tmp_path / name)
        assert read.keys() == entries.keys()
        assert all(np.allclose(read[key], entries[key]) for key in entries)


def test_an_imatrix_allows_the_smallest_types(bases: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(records(importance(bases("tiny-chat")), 1))
    overrides = ((r"blk\.5\.ffn_up", "iq2_xxs"),)
    recipe = GgufRecipe(type="q8_0", overrides=overrides, imatrix=str(tmp_path / "imatrix.dat"))
    types = quantized(bases("tiny-chat"), tmp_path / "small.gguf", recipe)
    assert types["blk.5.ffn_up.weight"] == "IQ2_XXS"
    assert np.isfinite(llama_logits(tmp_path / "small.gguf", PROMPT)).all()


def test_an_imatrix_changes_the_codes(bases: Callable[[str], Path], tmp_path: Path) -> None:
    name = "blk.3.ffn_up.weight"
    (tmp_path / "imatrix.dat").write_bytes(records(importance(bases("tiny-chat")), 1))
    codes = []
    for imatrix in (None, str(tmp_path / "imatrix.dat")):
        recipe = GgufRecipe(type="q8_0", overrides=((name, "q4_0"),), imatrix=imatrix)
        quantized(bases("tiny-chat"), tmp_path / "any.gguf", recipe)
        tensors = gguf.GGUFReader(tmp_path / "any.gguf").tensors
        codes.append(next(tensor.data.tobytes() for tensor in tensors if tensor.name == name))
    assert codes[0] != codes[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + bytes(60),
        struct.pack("<i", -1),
        struct.pack("<i", 10**9),
        struct.pack("<iii", 1, 4, 0),
        records({"a": np.array([np.nan], np.float32)}, 1),
        records({"a": np.array([-1], np.float32)}, 1),
        records({"a": np.ones(4, np.float32)}, 1)[:-24],
    ],
)
def test_a_damaged_imatrix_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "imatrix").write_bytes(content)
    with pytest.raises(BadRecipe) as caught:
        read_imatrix(tmp_path / "imatrix")
    assert str(tmp_path) not in str(caught.value)


def test_an_imatrix_of_another_model_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(records({"other.weight": np.ones(4, np.float32)}, 1))
    with pytest.raises(BadRecipe, match="another model"):
        quantized(
            bases("tiny-chat"),
            tmp_path / "no.gguf",
            GgufRecipe(type="q4_0", imatrix=str(tmp_path / "imatrix.dat")),
        )


def test_llama_cpps_reason_is_told_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF at all")
    with pytest.raises(BuildFailed) as caught:
        quantize(
            broken,
            tmp_path / "out.gguf",
            GGUF_PRESETS["q4_0"],
            progress=lambda _done, _total: None,
            threads=1,
        )
    message = str(caught.value)
    assert "llama.cpp could not make q4_0: " in message
    assert str(tmp_path) not in message
    assert "\n" not in message


def test_a_watcher_that_gives_up_is_heard(bases: Callable[[str], Path], tmp_path: Path) -> None:
    def give_up(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            bases("stories260K"), tmp_path / "out.gguf", GGUF_PRESETS["q4_0"], progress=give_up, threads=1
        )


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond 2 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("known", [True, False], ids=["errno", "asked"])
def test_a_write_that_fails_is_told_by_its_error(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, request: Any
) -> None:
    """Where errno says nothing any more, the disk is asked."""
    base = bases("tiny-chat")
    request.getfixturevalue("small_files")
    if not known:
        monkeypatch.setattr(Errno, "of_disk", lambda _: 0)
    with pytest.raises(BuildFailed, match="the build failed: File too large"):
        quantized(base, tmp_path / "any.gguf", GGUF_PRESETS["q8_0"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_short_is_noticed(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, target = library(), tmp_path / "any.gguf"

    def cut(*arguments: Any) -> int:
        assert native_quantize(*arguments) == 0
        os.truncate(target, target.stat().st_size - 100)
        return 0

    native_quantize = native.llama_model_quantize
    monkeypatch.setattr(native, "llama_model_quantize", cut)
    with pytest.raises(BuildFailed, match="q8_0: the file that it wrote is cut short"):
        quantized(bases("tiny-chat"), target, GGUF_PRESETS["q8_0"])
    assert list(tmp_path.iterdir()) == []
