"""Opening models: what is refused, what the limits are, what the web process is told."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from server.backends import registry
from server.backends.llama.backend import LLAMA, LlamaOpened, limits_for
from server.backends.llama.options import Options, parse_options
from server.errors import OpenError, RequestError
from server.types import Limits, Open
from tests.server.backends.llama.conftest import open_model
from tests.server.backends.llama.support import Line, step


def test_naming_the_backend_loads_nothing_heavy() -> None:
    code = (
        "import sys; from server.backends.llama.backend import LLAMA; assert LLAMA.probe() is None;"
        "print(*({'numpy', 'llama_cpp', 'torch', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_the_registry_finds_it_for_gguf() -> None:
    assert registry.for_format("gguf") is LLAMA


def test_the_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.backends.llama.backend.find_spec", lambda _: None)
    reason = LLAMA.probe()
    assert reason is not None
    assert "llama-cpp-python" in reason


# -- files --------------------------------------------------------------------------------------------


def test_a_folder_with_a_tokenizer_leaves_text_to_the_web_process(gguf_q4: Path) -> None:
    seen: list[float] = []
    spec = Open(backend="llama", variant=str(gguf_q4), context=128, parallel=2, threads=1)
    opened = LLAMA.open(spec, seen.append)
    assert opened.text is None
    with pytest.raises(RequestError):
        opened.tokenize("hello", add_special=True, parse_special=False)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert step(opened.executor, [Line([5, 6, 7]).row(0, 0)])[0].token is not None
    opened.executor.close()


def test_a_file_brings_its_own_vocabulary(q4: LlamaOpened, tiny_chat: Path) -> None:
    text = q4.text
    assert text is not None
    assert text.chat_template is not None
    assert "im_start" in text.chat_template
    assert (text.bos, text.eos, text.add_bos, text.space_first) == (0, 2, False, False)
    assert 2 in text.end_ids
    assert {text.pieces[token] for token in text.control} >= {b"<|im_start|>", b"<|im_end|>"}
    tokenizer = Tokenizer.from_file(str(tiny_chat / "tokenizer.json"))
    assert len(text.pieces) == tokenizer.get_vocab_size()
    for sample in ("Hello, world!", "naïve café: 12 345 €", "漢字 and 🙂", "  spaces\n\nlines\t"):
        tokens = q4.tokenize(sample, add_special=False, parse_special=False)
        assert tokens == tokenizer.encode(sample, add_special_tokens=False).ids
        assert b"".join(text.pieces[token] for token in tokens) == sample.encode()
    assert text.tokenizer is not None  # made of the file's vocabulary, for the web process
    made = Tokenizer.from_str(text.tokenizer)
    for sample in ("Hello, world! 漢字", "<|im_start|>user\n"):
        assert made.encode(sample).ids == q4.tokenize(sample, add_special=False, parse_special=True)


def test_special_tokens_are_read_only_where_asked_for(q4: LlamaOpened) -> None:
    markup = "<|im_start|>user"
    assert q4.tokenize(markup, add_special=False, parse_special=True)[0] == 1
    assert 1 not in q4.tokenize(markup, add_special=False, parse_special=False)


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\ud800", "x" * 100_000])
def test_odd_texts_are_tokenized(q4: LlamaOpened, text: str) -> None:
    assert q4.text is not None
    tokens = q4.tokenize(text, add_special=False, parse_special=True)
    assert b"".join(q4.text.pieces[token] for token in tokens) == text.encode("utf-8", "replace")


def test_a_sentencepiece_vocabulary_puts_a_space_first(shared: Callable[[str], Path], tmp_path: Path) -> None:
    from quant.gguf.convert import convert
    from quant.source import open_source

    source = open_source(str(shared("models/stories260K")), cache=tmp_path / "cache")
    convert(source, tmp_path / "stories.gguf", float_type="f32", progress=lambda done, total: None)
    opened = open_model(tmp_path / "stories.gguf", context=128, parallel=2, options={"kv_type": "f32"})
    assert opened.text is not None
    assert opened.text.space_first
    tokens = opened.tokenize("Once upon a time", add_special=False, parse_special=False)
    assert b"".join(opened.text.pieces[token] for token in tokens) == b" Once upon a time"
    assert opened.text.tokenizer is not None
    assert Tokenizer.from_str(opened.text.tokenizer).encode("Once upon a time").ids == tokens
    assert step(opened.executor, [Line(tokens).row(0, 0)])[0].token is not None
    opened.executor.close()


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    for variant in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(OpenError, match=r"^model\.gguf is not there"):
            open_model(variant)


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_a_reason(gguf_q4: Path, tmp_path: Path, share: float) -> None:
    data = (gguf_q4 / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(OpenError, match=r"cannot load cut\.gguf: \w+") as caught:
        open_model(cut)
    assert str(tmp_path) not in str(caught.value)
    assert "/" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GGUF", b"GGML"),
        (b"GGUF\x03", b"GGUF\x63"),
        (b"llama.embedding_length", b"llama.embedding_lengtX"),
        (b"blk.3.attn_q.weight", b"blk.3.attn_Q.weight"),
        (b"general.architecture\x08\x00\x00\x00\x05", b"general.architecture\x08\x00\x00\x00\xff"),
    ],
)
def test_a_damaged_file_is_refused_with_a_reason(
    gguf_q4: Path, tmp_path: Path, old: bytes, new: bytes
) -> None:
    data = (gguf_q4 / "model.gguf").read_bytes()
    assert old in data
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data.replace(old, new, 1))
    with pytest.raises(OpenError, match=r"cannot load damaged\.gguf: \w+"):
        open_model(damaged)


def test_after_a_refusal_another_model_opens(gguf_q4: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(OpenError):
        open_model(tmp_path / "bad.gguf")
    open_model(gguf_q4, parallel=1).executor.close()


# -- limits and options -------------------------------------------------------------------------------


def spec(**changes: object) -> Open:
    plain: dict[str, object] = {"backend": "llama", "variant": "x", "context": None, "parallel": 4}
    return Open(**(plain | changes))  # type: ignore[arg-type]  # the fields differ in type


def test_limits_follow_the_request_and_the_model() -> None:
    assert limits_for(spec(), Options(), 1024) == Limits(
        running=4, slots=4, context=1024, kv_tokens=4096, step_tokens=256
    )
    chosen = limits_for(
        spec(context=300, parallel=16, kv_tokens=1000), Options(slots=16, step_tokens=64), 1024
    )
    assert chosen == Limits(running=16, slots=16, context=300, kv_tokens=1000, step_tokens=64)


def test_a_step_is_never_larger_than_memory_nor_smaller_than_its_decoding_rows_and_a_page() -> None:
    assert limits_for(spec(context=100, parallel=1), Options(), 1024).step_tokens == 256
    assert limits_for(spec(parallel=100), Options(step_tokens=50), 1024).step_tokens == 116
    assert limits_for(spec(parallel=200, kv_tokens=9999), Options(), 1024).slots == 256


@pytest.mark.parametrize(
    "changes",
    [{"parallel": 0}, {"parallel": 257}, {"context": 100, "kv_tokens": 99}, {"context": 1, "parallel": 256}],
)
def test_limits_that_cannot_work_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(OpenError):
        limits_for(spec(**changes), Options(), 1024)


def test_more_slots_than_llama_cpp_has_are_refused() -> None:
    with pytest.raises(OpenError, match="256"):
        limits_for(spec(), Options(slots=300), 1024)


def test_options_are_read() -> None:
    options = {"kv_type": "q8_0", "slots": "5", "step_tokens": "100", "gpu_layers": "0"}
    assert parse_options(options) == Options(kv_type="q8_0", slots=5, step_tokens=100, gpu_layers=0)
    assert parse_options({}) == Options()


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_typ", "f16"), ("kv_type", "q3"), ("slots", "0"), ("slots", "many"), ("step_tokens", "1")],
)
def test_wrong_options_are_named(name: str, value: str) -> None:
    with pytest.raises(OpenError, match=name):
        parse_options({name: value})


def test_a_smaller_kv_type_works(gguf_q4: Path) -> None:
    opened = open_model(gguf_q4, parallel=2, options={"kv_type": "q8_0"})
    assert step(opened.executor, [Line([5, 6, 7]).row(0, 0)])[0].token is not None
    opened.executor.close()


def test_a_kv_type_that_the_model_cannot_have_is_refused(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its heads are 8 wide; a block of q8_0 is 32."""
    from quant.gguf.convert import convert
    from quant.source import open_source

    source = open_source(str(shared("models/stories260K")), cache=tmp_path / "cache")
    convert(source, tmp_path / "stories.gguf", float_type="f32", progress=lambda done, total: None)
    with pytest.raises(OpenError, match="cannot set up the model: "):
        open_model(tmp_path / "stories.gguf", options={"kv_type": "q8_0"})
