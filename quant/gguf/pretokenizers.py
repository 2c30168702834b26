"""How a tokenizer.json cuts text before merging, and llama.cpp's name for the same cuts.

A pre-tokenizer is written down as the tuple of its steps; the table maps tuples to names of
tokenizer.ggml.pre. Nothing is guessed from the model's name: a tuple outside the table is refused.
Source of the names: llama-vocab.cpp (llm_tokenizer_bpe, llama_vocab::impl::load).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import BadSource
from quant.files import shown

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PREFIX = r"[^\r\n\p{L}\p{N}]?"
CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

LLAMA3 = rf"{CONTRACTION}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}"
QWEN2 = rf"{CONTRACTION}|{WORDS}|\p{{N}}|{SIGNS}|{SPACES}"
LONG_NUMBERS = rf"{CONTRACTION}|{WORDS}|\p{{N}}+|{SIGNS}|{SPACES}"
SEED = rf"{CONTRACTION}|{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
TEKKEN = rf"{PREFIX}[{UPPER}]*[{LOWER}]+|{PREFIX}[{UPPER}]+[{LOWER}]*|\p{{N}}|{CASED_SIGNS}|{SPACES}"
GPT4O = (
    rf"{PREFIX}[{UPPER}]*[{LOWER}]+{CONTRACTION}?|{PREFIX}[{UPPER}]+[{LOWER}]*{CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{CASED_SIGNS}|{SPACES}"
)
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CASED = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6",
    "]+",
)  # a class of 60 ranges, of which copies differ: how it begins and ends
WIDE_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Steps = tuple[str, ...]
BYTES, GPT2_BYTES = "bytes", "bytes, gpt-2's regex"  # ByteLevel without and with its own regex
DIGIT, DIGITS = "digits, each alone", "digits"
CASED_LETTERS = "split cased letters"


def split(regex: str) -> str:
    return f"split {regex}"


@dataclass(frozen=True)
class Names:
    """llama.cpp's name where whole words are merged, and where a word in the vocabulary is taken at once."""

    merging: str | None = None
    ignoring_merges: str | None = None


TABLE: Mapping[Steps, Names] = {
    (GPT2_BYTES,): Names("gpt-2"),
    (DIGIT, GPT2_BYTES): Names("smollm"),
    (split(LLAMA3), BYTES): Names("smaug-bpe", "llama-bpe"),
    (split(QWEN2), BYTES): Names("qwen2"),
    (split(TEKKEN), BYTES): Names(None, "tekken"),
    (split(GPT4O), BYTES): Names("gpt-4o"),
    (split(SEED), BYTES): Names("seed-coder"),
    (split(r"\p{N}{1,3}"), split(LONG_NUMBERS), BYTES): Names(None, "minicpm5"),
    (split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(HAN), DIGIT, BYTES): Names(
        "deepseek-coder"
    ),
    (split(r"\p{N}{1,3}"), split(KANA), split(DEEPSEEK3), BYTES): Names("deepseek-v3"),
    (
        split(r"[\r\n]"),
        CASED_LETTERS,
        split(WIDE_SIGNS),
        split(r"\s+$"),
        split(HAN),
        DIGIT,
        BYTES,
    ): Names("deepseek-llm"),
}


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> Steps:
    return tuple(_steps(pre_tokenizer))


def _steps(node: Mapping[str, Any] | None) -> Iterator[str]:
    match node:
        case None:
            return
        case {"type": "Sequence", "pretokenizers": [*nodes]}:
            for inner in nodes:
                yield from _steps(inner)
        case {"type": "ByteLevel", "add_prefix_space": True}:
            yield "ByteLevel with a space before the text"
        case {"type": "ByteLevel"}:
            yield GPT2_BYTES if node.get("use_regex", True) else BYTES
        case {"type": "Digits"}:
            yield DIGIT if node.get("individual_digits") else DIGITS
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not node.get(
            "invert"
        ):
            yield CASED_LETTERS if _is_cased(regex) else split(_one_spelling(regex))
        case {"type": str(kind)}:
            yield f"{kind} { ({key: value for key, value in node.items() if key != 'type'}) }"
        case _:
            yield shown(node)


def _is_cased(regex: str) -> bool:
    return regex.startswith(CASED[0]) and regex.endswith(CASED[1]) and "[" not in regex[4:]


def _one_spelling(regex: str) -> str:
    """Line ends occur as themselves and as escapes."""
    return regex.replace("\r", r"\r").replace("\n", r"\n")


def name_of(steps: Steps, *, ignore_merges: bool, merges_complete: Callable[[], bool]) -> str:
    """llama.cpp's name. `merges_complete` says whether each token is what merging makes of its own text, so
    that it does not matter whether merges are ignored for whole words. Raises BadSource.
    """
    names = TABLE.get(steps)
    if names is None:
        raise BadSource(
            f"tokenizer.json: llama.cpp knows no such pre-tokenizer: {shown(' + '.join(steps) or 'none')}"
        )
    exact, other = names.merging, names.ignoring_merges
    if ignore_merges:
        exact, other = other, exact
    if name := exact or (merges_complete() and other):
        return name
    raise BadSource(
        f"tokenizer.json: llama.cpp has this pre-tokenizer only with ignore_merges {not ignore_merges}"
    )
