"""tokenizer.json to bytes, and files that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import OpenError
from server.text.vocabulary import BYTES, MAX_TOKENS, Vocabulary, parse_vocabulary, read_vocabulary

SPM_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġc": 2}, "merges": []}
    return {"model": model, "added_tokens": [], "decoder": {"type": "ByteLevel"}} | changes


def parse(**changes: Any) -> Vocabulary:
    return parse_vocabulary(json.dumps(tokenizer_json(**changes)).encode())


def test_the_byte_alphabet_names_every_byte_once() -> None:
    assert sorted(BYTES.values()) == list(range(256))
    assert BYTES["Ġ"] == 0x20
    assert BYTES["Ċ"] == 0x0A
    assert BYTES["a"] == 0x61


def test_byte_level_pieces() -> None:
    assert parse().pieces == (b"a", b"b", b" c")


def test_added_tokens_are_their_own_text_and_special_ones_are_control() -> None:
    added = [
        {"id": 5, "content": "<|end of text|>", "special": True},
        {"id": 3, "content": "<tool>", "special": False},
    ]
    vocabulary = parse(added_tokens=added)
    assert vocabulary.pieces[3:] == (b"<tool>", b"", b"<|end of text|>")
    assert vocabulary.control == {5}
    assert vocabulary.find("<tool>") == 3
    assert vocabulary.find("</tool>") is None


def test_sentencepiece_pieces() -> None:
    model = {"vocab": {"<unk>": 0, "<0x0A>": 1, "<0xE2>": 2, "▁the": 3, "<0xZZ>": 4}, "unk_token": "<unk>"}
    vocabulary = parse(model=model, decoder=SPM_DECODER)
    assert vocabulary.pieces == (b"<unk>", b"\n", b"\xe2", b" the", b"<0xZZ>")
    assert (vocabulary.start, vocabulary.unk) == ("one", "<unk>")


def test_unigram_vocabularies_are_lists() -> None:
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    vocabulary = parse(model={"vocab": [["▁a", -1.5], ["b", -2.0]]}, decoder=decoder)
    assert (vocabulary.pieces, vocabulary.start) == ((b" a", b"b"), "token")


def test_text_and_bytes_of_one_token() -> None:
    vocabulary = parse(model={"vocab": {"âĤ": 0, "Ġx": 1}})
    assert (vocabulary.bytes_of(0), vocabulary.text_of(0)) == (b"\xe2\x82", "\ufffd")
    assert (vocabulary.bytes_of(1), vocabulary.text_of(1)) == (b" x", " x")
    assert vocabulary.bytes_of(2) == vocabulary.bytes_of(-1) == b""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nul",
        b"[]",
        b"{}",
        b'{"model": {"vocab": 3}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": {"vocab": {"\\ud800": 0}}}',
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(OpenError, match=r"^tokenizer.json is not usable: .*$") as caught:
        parse_vocabulary(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": []}]}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, SPM_DECODER["decoders"][0]]}},
        {"model": {"vocab": {}}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": MAX_TOKENS}}},
        {"added_tokens": [{"id": 10**30, "content": "x"}]},
    ],
)
def test_what_cannot_be_shown_faithfully_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OpenError, match=r"^tokenizer.json"):
        parse(**changes)


def test_a_missing_file_is_refused_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=r"^tokenizer.json cannot be read: No such file") as caught:
        read_vocabulary(tmp_path / "tokenizer.json")
    assert str(tmp_path) not in str(caught.value)
