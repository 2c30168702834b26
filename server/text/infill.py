"""Prompts for the text between a prefix and a suffix, for models that were trained to fill it in."""

from dataclasses import dataclass
from typing import Literal

from server.errors import UnsupportedParameter
from server.text.model import TextModel
from server.text.vocabulary import Vocabulary

Part = Literal["prefix", "suffix"]


@dataclass(frozen=True)
class Infill:
    """Tokens and texts in their order; the answer follows the last."""

    order: tuple[tuple[str, Part | None], ...]  # a token, and what stands after it


FORMATS = (
    Infill((("<|fim_prefix|>", "prefix"), ("<|fim_suffix|>", "suffix"), ("<|fim_middle|>", None))),
    Infill((("<fim_prefix>", "prefix"), ("<fim_suffix>", "suffix"), ("<fim_middle>", None))),
    Infill((("<fim-prefix>", "prefix"), ("<fim-suffix>", "suffix"), ("<fim-middle>", None))),
    Infill((("▁<PRE>", "prefix"), ("▁<SUF>", "suffix"), ("▁<MID>", None))),
    Infill((("[SUFFIX]", "suffix"), ("[PREFIX]", "prefix"))),
    Infill(
        (("<｜fim▁begin｜>", "prefix"), ("<｜fim▁hole｜>", "suffix"), ("<｜fim▁end｜>", None))  # noqa: RUF001
    ),
)


async def infill_prompt(prefix: str | list[int], suffix: str, text: TextModel) -> list[int]:
    """Tokens of a prompt that asks for what stands between. Raises UnsupportedParameter."""
    row = next((row for row in FORMATS if all(_find(mark, text.vocabulary) for mark, _ in row.order)), None)
    if row is None:
        raise UnsupportedParameter("suffix: this model has no tokens for filling in", param="suffix")
    tokens: list[int] = [text.bos] if text.add_bos and text.bos is not None else []
    for mark, part in row.order:
        tokens += _find(mark, text.vocabulary)
        if part == "suffix":
            tokens += await text.encode(suffix, add_special=False, parse_special=False)
        elif part == "prefix" and isinstance(prefix, list):
            tokens += prefix
        elif part == "prefix":
            tokens += await text.encode(str(prefix), add_special=False, parse_special=False)
    return tokens


def _find(mark: str, vocabulary: Vocabulary) -> list[int]:
    """The mark's token, by its own name or with SentencePiece's spaces."""
    found = (vocabulary.find(spelling) for spelling in (mark, mark.replace("▁", " ")))
    return [token for token in found if token is not None][:1]
