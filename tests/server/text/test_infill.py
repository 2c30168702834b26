"""Prompts for what stands between two texts."""

import pytest

from server.errors import UnsupportedParameter
from server.text.infill import infill_prompt
from server.text.model import TextModel
from server.types import ModelText


def model(*marks: bytes, bos: int | None = None) -> TextModel:
    """Reads bytes as tokens; the marks follow."""

    async def tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not parse_special  # a client's text is text
        return list(text.encode())

    pieces = (*(bytes([byte]) for byte in range(256)), *marks)
    facts = ModelText(
        pieces=pieces,
        control=tuple(range(256, len(pieces))),
        chat_template=None,
        bos=bos,
        eos=None,
        end_ids=(),
        add_bos=bos is not None,
    )
    return TextModel.from_engine(facts, tokenize)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((b"<|fim_prefix|>", b"<|fim_suffix|>", b"<|fim_middle|>"), [256, *b"a<s>", 257, *b"b", 258]),
        ((b"[SUFFIX]", b"[PREFIX]"), [256, *b"b", 257, *b"a<s>"]),
        (("▁<PRE>".encode(), "▁<SUF>".encode(), "▁<MID>".encode()), [256, *b"a<s>", 257, *b"b", 258]),
        ((b" <PRE>", b" <SUF>", b" <MID>"), [256, *b"a<s>", 257, *b"b", 258]),
    ],
)
async def test_each_family_has_its_order(marks: tuple[bytes, ...], expected: list[int]) -> None:
    assert await infill_prompt("a<s>", "b", model(*marks)) == expected
    assert await infill_prompt(list(b"a<s>"), "b", model(*marks)) == expected


async def test_a_bos_comes_first_where_the_model_wants_one() -> None:
    prompt = await infill_prompt("a", "b", model(b"<fim_prefix>", b"<fim_suffix>", b"<fim_middle>", bos=0))
    assert prompt[0] == 0


async def test_other_models_are_named_as_the_reason() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        await infill_prompt("a", "b", model(b"<fim_prefix>"))
    assert caught.value.param == "suffix"
