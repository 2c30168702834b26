"""Figures of a measurement: standard errors that hold over samples, tails, loops, shelves, pages."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quant.measure.estimate import mean, mean_divergence
from quant.measure.figures import ends_in_a_loop, first_difference, greedy_of, histogram, joined, perplexity
from quant.measure.gate import Gate
from quant.measure.measurement import Block
from quant.measure.pictures import Point, Theme, against_bits, by_block, distribution
from quant.measure.score import compare, reference
from quant.measure.shards import Answer, ReferenceShelf, Shard
from quant.measure.shards import joined as joined_references
from quant.measure.text import Chunk
from tests.quant.measure.measurements import measurement
from tests.quant.measure.test_score import VOCABULARY, exact, some_text, table, text_of


def test_errors_hold_over_disjoint_samples_of_texts_that_differ() -> None:
    """Texts with a level of their own, of different lengths: what 20 samples of 40 texts must show."""
    rng = np.random.default_rng(3)
    means, errors = [], []
    for _ in range(20):
        levels = rng.lognormal(-3, 0.7, 40)
        texts = [rng.exponential(level, rng.integers(5, 150)).astype(np.float32) for level in levels]
        found = mean_divergence(texts)
        means.append(found.value)
        errors.append(found.error)
    pooled = float(np.mean(means))
    assert sum(abs(m - pooled) <= 2 * e for m, e in zip(means, errors, strict=True)) >= 17
    assert 0.6 <= np.std(means, ddof=1) / np.mean(errors) <= 1.5


def test_the_tail_is_what_the_rest_hides() -> None:
    """On the source's own text: the kept tokens' part and the tail's estimate make the exact divergence."""
    source, variant = table(1), table(2)
    rng = np.random.default_rng(0)
    weights = np.exp(source.rows.astype(np.float64))
    chances = weights / weights.sum(axis=1, keepdims=True)
    chunks = []
    for _ in range(60):
        tokens = [int(rng.integers(VOCABULARY))]
        for _ in range(60):
            tokens.append(int(rng.choice(VOCABULARY, p=chances[tokens[-1]])))
        chunks.append(Chunk(tuple(tokens)))
    text = text_of(*chunks)
    found = compare(variant, reference(source, text, kept=4))
    whole = float(np.mean(np.concatenate(exact(source, variant, text))))
    kept, tail = mean(found.divergence), mean(found.tail)
    assert kept.value < whole
    assert tail.value > 4 * tail.error  # there is something to find
    assert abs(kept.value + tail.value - whole) < 3 * tail.error


def test_a_shelf_gives_back_what_was_put_on_it(tmp_path: Path) -> None:
    source = table(1)
    texts = [some_text(5), some_text(6, chunks=2)]
    shelf = ReferenceShelf(tmp_path, ["x"])
    with shelf.extending():
        for number, text in enumerate(texts):
            shelf.add(number, Shard(reference(source, text, kept=8), (7,) * len(text.chunks)))
        shelf.add_greedy((Answer(prompt=7, prompt_tokens=(1, 2), tokens=(3,)),))
    again = ReferenceShelf(tmp_path, ["x"])
    shards = [again.shard(number) for number in range(3)]
    assert shards[2] is None
    found = [shard for shard in shards if shard]
    assert [shard.reference.text for shard in found] == texts
    assert found[1].prompts == (7, 7)
    assert again.greedy()[0].tokens == (3,)
    assert ReferenceShelf(tmp_path, ["y"]).shard(0) is None
    whole = joined_references([shard.reference for shard in found])
    parts = joined([compare(table(2), shard.reference) for shard in found])
    for one, other in zip(parts.divergence, compare(table(2), whole).divergence, strict=True):
        assert np.array_equal(one, other)
    next(again.folder.glob("00000*")).write_bytes(b"damaged")
    assert again.shard(0) is None


@pytest.mark.parametrize("tokens", [[5] * 16, [1, 2] * 9, [9, 9, 9, *([1, 2, 3, 4, 5] * 4)]])
def test_loops_are_seen(tokens: list[int]) -> None:
    assert ends_in_a_loop(tokens)
    assert not ends_in_a_loop([*tokens, 77, 78])


def test_no_loop_where_little_repeats() -> None:
    assert not ends_in_a_loop([])
    assert not ends_in_a_loop([1, 2, 3] * 2)
    assert not ends_in_a_loop(list(range(100)))


def test_greedy_answers_are_compared_token_by_token() -> None:
    assert [first_difference([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [1, 2])] == [None, 1, 2]
    found = greedy_of([([1, 2], [1, 2]), ([1, 2], [1, 3]), ([4], [5])], 8)
    assert (found.answers, found.same, found.median_first_difference) == (3, 1, 0.5)


def test_every_token_is_in_the_histogram() -> None:
    values = [np.array([0.0, 1e-12, 1e-3, 500.0], np.float32)]
    found = histogram(values)
    assert sum(found.counts) == 4
    assert found.counts[0] == 2
    assert found.counts[-1] == 1


def test_pictures_are_drawn_for_both_themes_and_are_the_same_again() -> None:
    blocks = tuple(Block(block=n, error=0.1 * n, added=0.1, fallbacks=("q",) * (n == 2)) for n in range(4))
    one = measurement(blocks=blocks)
    points = [
        Point("q4_k_m", one, "passed"),
        Point("q2_k", measurement(0.5, bits_per_weight=2.7), "rejected"),
    ]
    draws: list[Callable[[Theme], bytes]] = [
        lambda theme: against_bits(points, Gate(), theme),
        lambda theme: by_block(one, theme),
        lambda theme: distribution(one, theme),
    ]
    for draw in draws:
        light = draw("light")
        assert light.startswith(b"<?xml")
        assert light != draw("dark")
        assert draw("light") == light
    assert b"gate: mean KL" in against_bits(points, Gate(), "light")
    assert b"bits per weight" in against_bits(points, Gate(), "light")


def test_changes_of_perplexities_are_paired() -> None:
    """Texts differ much from each other, the variant little from its source: only pairing shows it."""
    rng = np.random.default_rng(4)
    theirs = [rng.normal(level, 0.3, 64).astype(np.float32) for level in rng.uniform(1, 5, 12)]
    ours = [chunk + rng.normal(0.02, 0.01, 64).astype(np.float32) for chunk in theirs]
    text = text_of(*(Chunk(tuple(range(65))) for _ in theirs))
    found = perplexity("ppl_window", text, ours, theirs)
    assert found.ln_change is not None
    assert found.ln_change.value == pytest.approx(np.log(found.value / found.source), abs=1e-6)
    assert abs(found.ln_change.value - 0.02) < 3 * found.ln_change.error < 0.01
    assert found.error / found.value > 50 * found.ln_change.error
    assert found.tokens == text.scored == 12 * 64
