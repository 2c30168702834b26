"""A tokenizer.json made of the vocabulary in a GGUF file: the way back of quant.gguf.tokenizer.

Byte-level BPE ("gpt2") has its merges in the file. SentencePiece ("llama") has scores: llama.cpp joins the
neighbours whose joined text scores highest, which is BPE whose merges are all pairs that make a token, best
first. Other kinds are not rebuilt. Nothing is believed: see quant.gguf.probe.require_equal.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.files import shown
from quant.gguf.cuts import CUTS
from quant.gguf.header import read_header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type
SPACE = "\u2581"
KEPT = frozenset({"<unk>", "<s>", "<|endoftext|>"})  # of Phi-3's special tokens: spaces behind them stay
KEYS = "tokenizer.ggml."


class CannotRebuild(BadSource):
    """The vocabulary is of a kind that only llama.cpp reads. One line."""


@dataclass(frozen=True)
class Stored:
    """What a GGUF file says of its tokenizer."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    unknown: int | None
    prefixed: bool  # a space goes before every text
    strips: bool  # special tokens take the spaces behind them


def read_stored(gguf: Path) -> Stored:
    """Raises BadSource for a file that is no GGUF, CannotRebuild for one without a vocabulary."""
    header = read_header(gguf, keep=lambda key: key.startswith(KEYS))
    values = {key.removeprefix(KEYS): value for key, value in header.metadata.items() if key.startswith(KEYS)}
    tokens = values.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CannotRebuild("the file has no vocabulary")
    kinds = values.get("token_type")
    unknown = values.get("unknown_token_id")
    return Stored(
        model=str(values.get("model")),
        pre=str(values.get("pre", "default")),
        tokens=tokens,
        kinds=kinds if isinstance(kinds, list) and len(kinds) == len(tokens) else [NORMAL] * len(tokens),
        scores=values.get("scores") or [0.0] * len(tokens),
        merges=values.get("merges") or (),
        unknown=unknown if isinstance(unknown, int) else None,
        prefixed=bool(values.get("add_space_prefix", True)),
        strips=_names_phi3(header.metadata.get("general.name")),
    )


def _names_phi3(name: object) -> bool:
    lower = str(name).lower()
    return "phi3" in lower or "phi-3" in lower


def rebuild(stored: Stored) -> str:
    """The text of a tokenizer.json. Raises CannotRebuild."""
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(stored.model)
    if make is None:
        raise CannotRebuild(f"a vocabulary of kind {shown(stored.model)}")
    try:
        data = make(stored)
    except UnicodeEncodeError:
        raise CannotRebuild("a token is no text") from None
    frame = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return json.dumps({**frame, "added_tokens": _added(stored), **data}, ensure_ascii=False)


def _byte_level(stored: Stored) -> dict[str, Any]:
    cuts = CUTS.get(stored.pre)
    if cuts is None:
        raise CannotRebuild(f"the pre-tokenizer {shown(stored.pre)}")
    vocabulary = _vocabulary(stored)
    merges = [pair for line in stored.merges if (pair := _pair(line, vocabulary))]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in cuts.regexes
    ]
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_step]},
        "decoder": {**bytes_step, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=cuts.ignores_merges),
    }


def _pair(line: str, vocabulary: Mapping[str, int]) -> tuple[str, str] | None:
    """None for a merge that makes no token."""
    left, _, right = line.partition(" ")
    made = left in vocabulary and right in vocabulary and left + right in vocabulary
    return (left, right) if made else None


def _sentencepiece(stored: Stored) -> dict[str, Any]:
    vocabulary = _vocabulary(stored)
    if sum(kind == BYTE for kind in stored.kinds) != 256:
        raise CannotRebuild("SentencePiece without the 256 byte tokens")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = [{"type": "Prepend", "prepend": SPACE}] if stored.prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if stored.prefixed else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = None if stored.unknown is None else stored.tokens[stored.unknown]
    model = _bpe(vocabulary, _scored_merges(stored, vocabulary), unknown=unknown)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepended, replaced]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {**model, "byte_fallback": True, "fuse_unk": True},
    }


def _scored_merges(stored: Stored, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a token, the highest score first.

    Of equal scores llama.cpp takes the leftmost pair, which no order of merges says: the probe judges it.
    """
    found = [
        (-stored.scores[number], number, text[:cut], text[cut:])
        for text, number in vocabulary.items()
        if stored.kinds[number] in {NORMAL, USER_DEFINED, UNUSED}
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    found.sort(key=lambda one: one[:2])
    return [(left, right) for _, _, left, right in found]


def _bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    unknown: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def _vocabulary(stored: Stored) -> dict[str, int]:
    """Control tokens too: `tokenizers` takes ids from here."""
    found: dict[str, int] = {}
    for number, text in enumerate(stored.tokens):
        if not text:
            continue
        text.encode()  # broken UTF-8 came as surrogates
        if found.setdefault(text, number) != number:
            raise CannotRebuild(f"two tokens are {shown(text)}")
    return found


def _added(stored: Stored) -> list[dict[str, Any]]:
    return [*_added_tokens(stored)]


def _added_tokens(stored: Stored) -> Iterator[dict[str, Any]]:
    for number, (text, kind) in enumerate(zip(stored.tokens, stored.kinds, strict=True)):
        if kind in {CONTROL, USER_DEFINED, UNKNOWN} and text:
            yield {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": _rstrips(stored, text),
                "normalized": False,
                "special": kind != USER_DEFINED,
            }


def _rstrips(stored: Stored, text: str) -> bool:
    """llama.cpp's rule for Phi-3."""
    return stored.strips and text not in KEPT
