"""The detokenizer against `tokenizers` itself and against Python's own decoding of the joined bytes."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.text.detokenize import Detokenizer, detokenize
from server.text.vocabulary import Vocabulary, parse_vocabulary, read_vocabulary

REPO = Path(__file__).parents[3]
TINY = REPO / "models" / "tiny-chat" / "tokenizer.json"
STORIES = REPO.parent / "shared" / "models" / "stories260K" / "tokenizer.json"
BYTE_VOCABULARY = Vocabulary(tuple(bytes([i]) for i in range(256)), frozenset())

Case = tuple[Vocabulary, Tokenizer]


@pytest.fixture(scope="module")
def tiny() -> Case:
    return read_vocabulary(TINY), Tokenizer.from_file(str(TINY))


@pytest.fixture(scope="module")
def stories(shared: Callable[[str], Path]) -> Case:
    path = shared("models/stories260K") / "tokenizer.json"
    return read_vocabulary(path), Tokenizer.from_file(str(path))


def pieces_of(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    ends = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [tokens[a:b] for a, b in pairwise(ends)]


def streamed(vocabulary: Vocabulary, parts: list[list[int]], *, show_control: bool = False) -> str:
    detokenizer = Detokenizer(vocabulary, show_control=show_control)
    return "".join(detokenizer.push(part) for part in parts) + detokenizer.flush()


def joined(vocabulary: Vocabulary, tokens: list[int]) -> bytes:
    return b"".join(vocabulary.pieces[t] for t in tokens if t not in vocabulary.control)


tokens_of = st.lists(st.integers(0, 2**31), max_size=40)
cuts_of = st.lists(st.integers(0, 2**31), max_size=10)


@settings(deadline=None, max_examples=300)
@given(seeds=tokens_of, cuts=cuts_of, show=st.booleans())
def test_byte_level_equals_tokenizers_for_any_tokens(
    tiny: Case, seeds: list[int], cuts: list[int], show: bool
) -> None:
    vocabulary, tokenizer = tiny
    # Half of the tokens are single bytes, so that broken characters are common.
    tokens = [seed % 260 if seed % 2 else seed % len(vocabulary.pieces) for seed in seeds]
    expected = tokenizer.decode(tokens, skip_special_tokens=not show)
    assert streamed(vocabulary, [[t] for t in tokens], show_control=show) == expected
    assert streamed(vocabulary, pieces_of(tokens, cuts), show_control=show) == expected
    assert detokenize(vocabulary, tokens, show_control=show) == expected


@settings(deadline=None, max_examples=300)
@given(seeds=tokens_of, cuts=cuts_of)
def test_sentencepiece_equals_tokenizers_where_bytes_are_characters(
    stories: Case, seeds: list[int], cuts: list[int]
) -> None:
    vocabulary, tokenizer = stories
    tokens = [seed % len(vocabulary.pieces) for seed in seeds]
    data = joined(vocabulary, tokens)
    expected = data.removeprefix(b" ").decode("utf-8", "replace")
    assert streamed(vocabulary, [[t] for t in tokens]) == expected
    assert streamed(vocabulary, pieces_of(tokens, cuts)) == expected
    # In a broken run of bytes `tokenizers` gives one U+FFFD a byte, also for whole characters in it.
    if b"\xff" not in data and "\ufffd" not in data.decode("utf-8", "replace"):
        assert expected == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60), cuts=cuts_of)
def test_a_text_comes_back_token_by_token(stories: Case, tiny: Case, text: str, cuts: list[int]) -> None:
    for vocabulary, tokenizer in (stories, tiny):
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        assert streamed(vocabulary, pieces_of(tokens, cuts)) == tokenizer.decode(tokens)


@settings(max_examples=500)
@given(st.binary(max_size=30), cuts_of)
def test_random_bytes_are_replaced_as_python_does(data: bytes, cuts: list[int]) -> None:
    parts = pieces_of(list(data), cuts)
    assert streamed(BYTE_VOCABULARY, parts) == data.decode("utf-8", "replace")


@settings(max_examples=300)
@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=20))
def test_never_half_a_character(text: str) -> None:
    """What is out after each byte is exactly the whole characters so far."""
    detokenizer, out, data = Detokenizer(BYTE_VOCABULARY), "", text.encode()
    for i, byte in enumerate(data, 1):
        out += detokenizer.push([byte])
        assert out == data[:i].decode("utf-8", "ignore")
    assert detokenizer.flush() == ""


def test_a_half_character_at_the_end_comes_out_at_the_flush() -> None:
    detokenizer = Detokenizer(BYTE_VOCABULARY)
    assert detokenizer.push("a€".encode()[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_continued_text_keeps_its_first_space(stories: Case) -> None:
    vocabulary, tokenizer = stories
    tokens = tokenizer.encode("once", add_special_tokens=False).ids
    assert Detokenizer(vocabulary).push(tokens) == "once"
    assert Detokenizer(vocabulary, begins=False).push(tokens) == " once"


def test_control_tokens_before_the_text_do_not_use_up_the_rule(stories: Case) -> None:
    vocabulary, tokenizer = stories
    tokens = [1, *tokenizer.encode("once", add_special_tokens=False).ids]
    detokenizer = Detokenizer(vocabulary)
    assert "".join(detokenizer.push([token]) for token in tokens) == "once" == tokenizer.decode(tokens)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("tokens", [[0, 0], [1, 0], [2, 1], [3, 0, 1], [2, 2]])
def test_metaspace_equals_tokenizers(scheme: str, tokens: list[int]) -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "▁▁": 3}, []))
    tokenizer.decoder = decoders.Metaspace("▁", scheme)
    vocabulary = parse_vocabulary(tokenizer.to_str().encode())
    assert streamed(vocabulary, [[t] for t in tokens]) == tokenizer.decode(tokens)
    assert streamed(vocabulary, [tokens]) == tokenizer.decode(tokens)


def test_ids_beyond_the_vocabulary_have_no_text(tiny: Case) -> None:
    vocabulary, _ = tiny
    a = vocabulary.find("a")
    assert a is not None
    assert Detokenizer(vocabulary).push([a, len(vocabulary.pieces), a]) == "aa"
