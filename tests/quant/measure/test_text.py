"""How a text is cut, and which tokens are scored."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import BadSource
from quant.measure.text import Chunk, Corpus, chunked, halves, read_corpus, windows
from tests.quant.checkpoints import tokenizer_json


def corpus(count: int, begins_with: int | None = None) -> Corpus:
    return Corpus(tokens=tuple(range(count)), digest="0" * 64, tokenizer="1" * 64, begins_with=begins_with)


def test_chunks_drop_the_tail() -> None:
    text = chunked(corpus(11), 5)
    assert [chunk.tokens for chunk in text.chunks] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert text.scored == 8
    assert text.longest == 5


def test_halves_as_llama_cpp_has_them() -> None:
    """Of 512 tokens 255 are scored: those after the second half's first; the chunk's first is replaced."""
    first, second = halves(corpus(1100, begins_with=9999)).chunks
    assert first.tokens == (9999, *range(1, 512))
    assert second.tokens[:2] == (9999, 513)
    assert first.scored == 255
    assert halves(corpus(512)).chunks[0].tokens[0] == 0


@given(st.integers(2, 200), st.integers(2, 60), st.data())
def test_windows_score_each_token_once(count: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size - 1))
    text = windows(corpus(count), size, stride)
    scored = [token for chunk in text.chunks for token in chunk.tokens[chunk.first :]]
    assert scored == list(range(1, count))
    assert all(chunk.first >= size - stride for chunk in text.chunks[1:])
    assert text.longest <= size


def test_what_cannot_be_cut() -> None:
    with pytest.raises(BadSource, match="has 3 tokens, too few"):
        chunked(corpus(3), 4)
    with pytest.raises(ValueError, match="stride"):
        windows(corpus(3), 2, 2)
    for first in (0, 2):
        with pytest.raises(ValueError, match="scored"):
            Chunk((1, 2), first)


def test_the_digest_is_of_what_is_read_and_scored() -> None:
    assert chunked(corpus(8), 4).digest == chunked(corpus(9), 4).digest
    assert chunked(corpus(8), 4).digest != halves(corpus(8), 4).digest


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "text.txt").write_text("Once upon a time")
    read = read_corpus(tmp_path / "text.txt", tmp_path / "tokenizer.json")
    assert read.tokens
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSource, match=r"text\.txt cannot be read as UTF-8"):
        read_corpus(tmp_path / "text.txt", tmp_path / "tokenizer.json")
    with pytest.raises(BadSource, match="missing"):
        read_corpus(tmp_path / "missing", tmp_path / "tokenizer.json")
