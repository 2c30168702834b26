"""Divergence and agreement: by hand, against the exact formula, and what must hold for any two models."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadSource, BuildFailed
from quant.measure.score import Comparison, Reference, Singles, compare, reference, surprises
from quant.measure.stored import load_reference, save_reference
from quant.measure.text import Chunk, Text

VOCABULARY = 40


class Table:
    """A bigram model: the row of the token itself, noised by what came before."""

    def __init__(self, rows: Singles) -> None:
        self.rows = rows

    def __call__(self, tokens: Sequence[int]) -> Singles:
        return self.rows[list(tokens)]


def text_of(*chunks: Chunk) -> Text:
    return Text(chunks=chunks, corpus="0" * 64, tokenizer="1" * 64, cut="by hand")


def table(seed: int, spread: float = 2.0) -> Table:
    rows = np.random.default_rng(seed).normal(0, spread, (VOCABULARY, VOCABULARY))
    return Table(rows.astype(np.float32))


def some_text(seed: int, chunks: int = 4, size: int = 30) -> Text:
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(chunks, size)).tolist()
    return text_of(*(Chunk(tuple(run), 1 + index) for index, run in enumerate(tokens)))


def probabilities(model: Table, chunk: Chunk) -> np.ndarray:
    rows = model.rows[list(chunk.tokens)][chunk.first - 1 : -1].astype(np.float64)
    weights = np.exp(rows)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def exact(source: Table, variant: Table, text: Text) -> list[np.ndarray]:
    pairs = [(probabilities(source, chunk), probabilities(variant, chunk)) for chunk in text.chunks]
    return [(p * np.log(p / q)).sum(axis=1) for p, q in pairs]


def compared(source: Table, variant: Table, text: Text, kept: int) -> Comparison:
    return compare(variant, reference(source, text, kept=kept))


def test_by_hand() -> None:
    """Five equal tokens against one of a half: KL = ln(0.2 / 0.5) / 5 + 4 ln(0.2 / 0.125) / 5."""
    even = Table(np.zeros((5, 5), np.float32))
    odd = Table(np.log(np.array([[0.5, 0.125, 0.125, 0.125, 0.125]] * 5, np.float32)))
    text = text_of(Chunk((1, 0, 2)), Chunk((3, 4, 0)))
    result = compared(even, odd, text, kept=5)
    by_hand = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.2 / 0.125)
    score = result.score()
    assert score.mean.value == pytest.approx(by_hand, rel=1e-6)
    assert score.max == pytest.approx(by_hand, rel=1e-6)
    assert score.top1.value == 1.0  # of equal ones the lowest id counts
    assert score.top5.value == 1.0
    assert score.tokens == 4
    # the text's tokens are 0, 2, 4, 0: half of them got 1/2, the others 1/8
    assert score.log_perplexity.value == pytest.approx((math.log(2) + math.log(8)) / 2, rel=1e-6)
    assert score.log_perplexity_change.value == pytest.approx(
        (math.log(2) + math.log(8)) / 2 - math.log(5), rel=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.1, 12))
def test_the_exact_divergence_where_all_is_kept(ours: int, theirs: int, spread: float) -> None:
    source, variant, text = table(ours, spread), table(theirs, spread), some_text(ours)
    found = compared(source, variant, text, kept=VOCABULARY)
    for chunk, expected in zip(found.divergence, exact(source, variant, text), strict=True):
        np.testing.assert_allclose(chunk, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(5, VOCABULARY))
def test_keeping_fewer_never_shows_more(ours: int, theirs: int, kept: int) -> None:
    source, variant, text = table(ours), table(theirs), some_text(ours)
    fewer = compared(source, variant, text, kept=kept).divergence
    for chunk, all_of_it in zip(fewer, exact(source, variant, text), strict=True):
        assert (chunk <= all_of_it + 1e-5).all()
        assert (chunk >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, VOCABULARY), st.floats(0.01, 200))
def test_a_model_and_itself_are_the_same(seed: int, kept: int, spread: float) -> None:
    model, text = table(seed, spread), some_text(seed)
    score = compared(model, model, text, kept).score()
    assert (score.mean.value, score.mean.error, score.max, score.p999.value) == (0, 0, 0, 0)
    assert (score.top1.value, score.top5.value) == (1, 1)
    assert (score.log_perplexity_change.value, score.log_perplexity_change.error) == (0, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-30, 30))
def test_a_constant_on_every_row_changes_nothing(seed: int, constant: float) -> None:
    source, variant, text = table(seed), table(seed + 1), some_text(seed)
    moved = Table(variant.rows + np.float32(constant))
    one, other = (compared(source, model, text, kept=8) for model in (variant, moved))
    assert one.score().mean.value == pytest.approx(other.score().mean.value, rel=1e-4)


def test_differences_are_paired() -> None:
    """Two variants that are each far from the source, in the same places: their difference is well known."""
    source, text = table(1), some_text(1, chunks=12)
    noise = table(2).rows
    far, further = (Table(source.rows + np.float32(step) * noise) for step in (0.30, 0.31))
    one, other = (compared(source, model, text, kept=VOCABULARY) for model in (far, further))
    difference = other.further_than(one)
    assert difference.value > 2 * difference.error > 0
    assert difference.error < 0.2 * one.score().mean.error
    assert other.further_than(one, 1.1).value < 0


def test_a_token_that_a_variant_calls_impossible() -> None:
    source = Table(np.zeros((2, 6), np.float32))
    rows = np.zeros((2, 6), np.float32)
    rows[:, 3] = -1000.0
    score = compared(source, Table(rows), text_of(Chunk((0, 1, 0))), kept=6).score()
    assert 10 < score.mean.value < 200


def test_numbers_that_are_none() -> None:
    rows = np.zeros((4, 8), np.float32)
    rows[2, 5] = np.nan
    with pytest.raises(BuildFailed, match="NaN"):
        reference(Table(rows), text_of(Chunk((1, 2, 3))))
    assert surprises(Table(rows), text_of(Chunk((1, 3, 2))))[0].shape == (
        2,
    )  # after the last nothing is scored


def test_stored_and_read_again(tmp_path: Path) -> None:
    source, text = table(4), some_text(4)
    kept = reference(source, text, kept=9)
    save_reference(kept, tmp_path / "reference.safetensors")
    again: Reference = load_reference(tmp_path / "reference.safetensors", text)
    one, other = (compare(table(5), stored) for stored in (kept, again))
    assert one.score() == other.score()
    with pytest.raises(BadSource, match="another text"):
        load_reference(tmp_path / "reference.safetensors", some_text(5))
    (tmp_path / "reference.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(BadSource, match="no stored reference"):
        load_reference(tmp_path / "reference.safetensors", text)
