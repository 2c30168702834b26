"""A published variant's text, and an engine's."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.errors import OpenError, RequestError
from server.text.detokenize import detokenize
from server.text.model import TextModel
from server.text.tokenizer import INLINE_CHARS, LocalTokenizer
from server.types import ModelText

HI = [{"role": "user", "content": "Hi"}]
FACTS: dict[str, Any] = {
    "bos": 0,
    "eos": 2,
    "end_ids": [0, 2],
    "add_bos": False,
    "context": 1024,
    "sampling": {"temperature": 0.7, "top_p": 0.9},
}


def folder(target: Path, source: Path, facts: dict[str, Any], template: str | None) -> Path:
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (target / "text.json").write_text(json.dumps(facts))
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    return target


@pytest.fixture
def variant(tmp_path: Path, tiny_chat: Path) -> Path:
    return folder(tmp_path, tiny_chat, FACTS, None)


@pytest.fixture
def stories(tmp_path: Path, shared: Callable[[str], Path]) -> Path:
    facts = {"bos": 1, "eos": 2, "end_ids": [2], "add_bos": True, "context": 512}
    return folder(tmp_path, shared("models/stories260K"), facts, None)


def test_what_it_knows(variant: Path) -> None:
    model = TextModel.from_folder(variant)
    assert (model.bos, model.eos, model.end_ids, model.add_bos) == (0, 2, frozenset({0, 2}), False)
    assert (model.context, model.vocab_size, model.control) == (1024, 16384, frozenset(range(4)))
    assert (model.sampling.temperature, model.sampling.top_p, model.sampling.top_k) == (0.7, 0.9, None)


async def test_chatml_where_its_marks_are_tokens(variant: Path) -> None:
    model = TextModel.from_folder(variant)
    assert (model.template_origin, model.default_stops) == ("default-chatml", ())
    text = model.render([{"role": "system", "content": "S"}, *HI])
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokens = await model.encode_chat(HI)
    assert tokens[0] == 1
    assert detokenize(model.vocabulary, tokens, show_control=True) == model.render(HI)


def test_chatml_ends_an_answer_whatever_the_config_says(tmp_path: Path, tiny_chat: Path) -> None:
    facts = FACTS | {"eos": 0, "end_ids": [0]}
    assert TextModel.from_folder(folder(tmp_path, tiny_chat, facts, None)).end_ids == {0, 2}


async def test_a_plain_template_and_one_bos_otherwise(stories: Path) -> None:
    model = TextModel.from_folder(stories)
    assert (model.template_origin, model.default_stops) == ("default-plain", ("\nUser:",))
    conversation = [{"role": "system", "content": "S"}, *HI, {"role": "assistant", "content": "Yes"}, *HI]
    assert model.render(conversation) == "S\n\nUser: Hi\nAssistant: Yes\nUser: Hi\nAssistant:"
    tokens = await model.encode_chat(HI)
    assert tokens.count(1) == 1
    assert tokens[0] == 1
    assert detokenize(model.vocabulary, tokens) == "User: Hi\nAssistant:"


async def test_a_template_that_writes_bos_gets_no_second(stories: Path) -> None:
    (stories / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    model = TextModel.from_folder(stories)
    assert model.template_origin == "model"
    tokens = await model.encode_chat(HI)
    assert (tokens[0], tokens[-1], tokens.count(1)) == (1, 2, 1)


async def test_special_tokens_are_read_or_not(variant: Path) -> None:
    model = TextModel.from_folder(variant)
    text = "a<|im_end|>b"
    assert 2 in await model.encode(text, add_special=False, parse_special=True)
    literal = await model.encode(text, add_special=False, parse_special=False)
    assert 2 not in literal
    assert detokenize(model.vocabulary, literal) == text


async def test_bos_only_where_it_is_asked_for(stories: Path) -> None:
    model = TextModel.from_folder(stories)
    assert (await model.encode("a", add_special=True, parse_special=True))[0] == 1
    assert (await model.encode("a", add_special=False, parse_special=True))[0] != 1


async def test_no_bos_where_the_model_wants_none(variant: Path) -> None:
    model = TextModel.from_folder(variant)
    plain = await model.encode("a", add_special=False, parse_special=True)
    assert await model.encode("a", add_special=True, parse_special=True) == plain


@pytest.fixture(scope="module")
def pair(tiny_chat: Path) -> tuple[LocalTokenizer, Tokenizer]:
    source = (tiny_chat / "tokenizer.json").read_text("utf-8")
    return LocalTokenizer(source, None), Tokenizer.from_str(source)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=200))
def test_tokens_are_those_of_tokenizers(pair: tuple[LocalTokenizer, Tokenizer], text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text, False, True) == theirs.encode(text, add_special_tokens=False).ids


async def test_long_texts_do_not_stop_the_loop(variant: Path) -> None:
    """The tokenizer's ordinary `encode` would: it holds the interpreter until it is done."""
    model = TextModel.from_folder(variant)
    encoding = asyncio.create_task(
        model.encode("many words " * 100_000, add_special=False, parse_special=True)
    )
    ticks = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert len(await encoding) > INLINE_CHARS
    assert ticks > 20


def test_padding_and_truncation_of_the_file_are_ignored(tiny_chat: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_chat / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    plain = Tokenizer.from_file(str(tiny_chat / "tokenizer.json"))
    text = "one two three four five six"
    assert LocalTokenizer(tokenizer.to_str(), None).encode(text, False, True) == plain.encode(text).ids


async def test_a_lone_surrogate_is_the_client_s_mistake(variant: Path) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        await TextModel.from_folder(variant).encode("\ud800", add_special=False, parse_special=True)


async def test_a_text_that_the_tokenizer_cannot_read_is_a_400(tmp_path: Path) -> None:
    broken = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
        "added_tokens": [],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(RequestError, match="cannot read this text"):
        await TextModel.from_folder(tmp_path).encode("b", add_special=True, parse_special=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        (
            "tokenizer.json",
            b'{"model": {"type": "Zorp", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}}',
        ),
        ("text.json", b"[]"),
        ("text.json", b'{"bos": "<s>"}'),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"\xff\xff"),
        ("chat_template.jinja", b"x" * (4 << 20)),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(variant: Path, name: str, content: bytes) -> None:
    (variant / name).write_bytes(content)
    with pytest.raises(OpenError, match=r"^[^\n]{1,300}$"):
        TextModel.from_folder(variant)


def test_a_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=r"tokenizer.json cannot be read"):
        TextModel.from_folder(tmp_path)


async def engine_tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    words = text.split("|") if parse_special else [text]
    return [9] * add_special + [len(word) for word in words]


async def test_an_engine_s_text() -> None:
    text = ModelText(
        pieces=(b" one", b"<s>", b" two", b"</s>"),
        control=(1, 3),
        chat_template="{{ bos_token }}{{ messages[0].content }}",
        bos=1,
        eos=3,
        end_ids=(3,),
        add_bos=True,
        space_first=True,
    )
    model = TextModel.from_engine(text, engine_tokenize)
    assert (model.template_origin, model.end_ids, model.context) == ("model", frozenset({3}), None)
    assert detokenize(model.vocabulary, [1, 0, 2, 3]) == "one two"
    assert model.render(HI) == "<s>Hi"
    assert await model.encode_chat(HI) == [5]
    assert await model.encode("a|bc", add_special=True, parse_special=True) == [9, 1, 2]


async def test_a_tokenizer_that_the_engine_made_keeps_text_in_this_process(tiny_chat: Path) -> None:
    """The engine is not asked."""
    made = (tiny_chat / "tokenizer.json").read_text()
    text = ModelText(
        pieces=(b"<s>", b"a"), control=(0,), chat_template=None, bos=0, eos=None, end_ids=(), add_bos=True
    )
    model = TextModel.from_engine(msgspec.structs.replace(text, tokenizer=made), engine_tokenize)
    plain = TextModel.from_folder(tiny_chat)
    for words in ("Hello there", "<|im_start|>user"):
        ids = await plain.encode(words, add_special=False, parse_special=True)
        assert await model.encode(words, add_special=True, parse_special=True) == [0, *ids]


async def test_an_engine_without_a_template() -> None:
    text = ModelText(
        pieces=(b"a",), control=(), chat_template=None, bos=None, eos=None, end_ids=(), add_bos=False
    )
    model = TextModel.from_engine(text, engine_tokenize)
    assert (model.template_origin, detokenize(model.vocabulary, [0])) == ("default-plain", "a")


def test_importing_it_stays_light() -> None:
    heavy = ["numpy", "torch", "transformers", "gguf", "huggingface_hub"]
    code = f"import server.text.model, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
