"""What lies beside the weights is the source's, and what is not is named."""

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from quant.measure.beside import strange
from quant.measure.gate import Gate, judge
from quant.source import Source, open_source
from tests.conftest import build
from tests.quant.measure.breaking import change_file, swap_tokens
from tests.quant.measure.measurements import measurement

Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def source(session_cache: Path, tiny_chat: Path) -> Source:
    return open_source(str(tiny_chat), cache=session_cache)


def float_of(key: str, value: float) -> Change:
    """Of a GGUF file: key, type 6 (float32), value."""

    def change(data: bytes) -> bytes:
        at = data.index(key.encode()) + len(key)
        assert data[at : at + 4] == struct.pack("<I", 6)
        return data[: at + 4] + struct.pack("<f", value) + data[at + 8 :]

    return change


def json_of(**fields: object) -> Change:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


HARM: list[tuple[str, str, Change, str]] = [
    ("q4_0", "tokenizer.json", swap_tokens, "tokenizer.json"),
    ("q4_0", "chat_template.jinja", lambda data: data + b"!", "chat_template.jinja"),
    ("q4_0", "text.json", json_of(end_ids=[2]), "text.json"),
    ("q4_0", "model.gguf", float_of("llama.rope.freq_base", 2e4), "llama.rope.freq_base"),
    ("nf4", "config.json", json_of(rms_norm_eps=1e-3), "config.json's rms_norm_eps"),
    ("nf4", "config.json", json_of(rope_theta=2e4), "config.json's rope_theta"),
    ("nf4", "tokenizer.json", swap_tokens, "tokenizer.json"),
]


@pytest.mark.parametrize(("recipe", "file", "change", "named"), HARM)
def test_what_is_not_the_sources_is_named(  # noqa: PLR0913, PLR0917
    tmp_path: Path,
    session_cache: Path,
    source: Source,
    gguf_f32: Path,
    recipe: str,
    file: str,
    change: Change,
    named: str,
) -> None:
    folder = build(session_cache, source.path, recipe)
    look = partial(strange, source, gguf_f32)
    assert look(folder) == ()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change_file(copy, file, change)
    assert look(copy) == (named,)


def test_a_file_that_is_gone_is_named(
    tmp_path: Path, session_cache: Path, source: Source, gguf_f32: Path
) -> None:
    copy = Path(shutil.copytree(build(session_cache, source.path, "q4_0"), tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    assert strange(source, gguf_f32, copy) == ("chat_template.jinja",)


def test_the_gate_rejects_it_however_small_the_divergence() -> None:
    found = judge(measurement(0.0001, strange=("tokenizer.json",)), Gate(max_times_rounding=None))
    assert str(found) == "rejected: not the source's: tokenizer.json"
