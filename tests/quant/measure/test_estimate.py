"""Means over chunks and their errors: small cases by hand, and that the errors are as large as they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.measure.estimate import LEAST_SPREAD, Estimate, mean, mean_difference, mean_divergence, quantile

Numbers = st.lists(
    st.lists(st.integers(-100, 100), min_size=1, max_size=5).map(np.array), min_size=2, max_size=6
)


def test_by_hand() -> None:
    chunks = [np.array([1.0, 3.0]), np.array([5.0, 7.0])]
    estimate = mean(chunks)
    assert estimate.value == 4.0
    # without one chunk the mean is 6 or 2: the jackknife has (1/2) * 8 = 4
    # levels 7, tokens 2: (7 * 8 + 2 * 4) / 16 = 4, the same
    assert estimate.error == pytest.approx(math.sqrt(4 * (1 + 1 / 1.5)))  # two chunks are few


def test_of_equal_chunks_it_is_the_error_of_their_means() -> None:
    chunks = np.random.default_rng(1).normal(size=(20, 50))
    means = chunks.mean(axis=1)
    assert mean(list(chunks)).error == pytest.approx(means.std(ddof=1) / math.sqrt(20), rel=0.04)


def test_one_chunk_has_no_error() -> None:
    assert mean([np.ones(4)]).error == math.inf
    assert quantile([np.ones(4)], 0.5).error == math.inf


@settings(max_examples=50, deadline=None)
@given(Numbers)
def test_of_a_thing_and_itself_no_difference(chunks: list[np.ndarray]) -> None:
    estimate = mean_difference(chunks, chunks)
    assert (estimate.value, estimate.error) == (0.0, 0.0)


@settings(max_examples=50, deadline=None)
@given(Numbers, st.integers(-50, 50))
def test_a_constant_difference_is_certain(chunks: list[np.ndarray], step: int) -> None:
    estimate = mean_difference([chunk + step for chunk in chunks], chunks)
    assert estimate.value == pytest.approx(step, abs=1e-9)
    assert estimate.error == pytest.approx(0, abs=1e-9)


def test_unlike_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        mean_difference([np.ones(3)], [np.ones(3), np.ones(3)])
    with pytest.raises(ValueError, match="broadcast"):
        mean_difference([np.ones(3)], [np.ones(4)])


@pytest.mark.parametrize("tokens", [1, 30])
def test_errors_are_right_for_tokens_that_are_alike(tokens: int) -> None:
    """Of 400 samples about 68 % lie within one error of the truth, though a chunk's tokens share a level."""
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        chunks = list(random.normal(size=(25, 1)) + random.normal(size=(25, tokens)))
        estimate = mean(chunks)
        inside += abs(estimate.value) < estimate.error
    assert 0.60 < inside / 400 < 0.75


def test_errors_of_skewed_divergences() -> None:
    """Few texts suffer most. A sample that lacks them must not be too sure of its mean."""
    random = np.random.default_rng(4)
    lengths = np.clip(random.lognormal(3.3, 1.0, (300, 16)), 3, 190).astype(int)
    levels = np.where(random.random((300, 16)) < 0.05, 0.24, 0.08)
    samples = [
        [random.exponential(level, length) for level, length in zip(*pair, strict=True)]
        for pair in zip(levels, lengths, strict=True)
    ]
    ours, plain = list(map(mean_divergence, samples)), list(map(mean, samples))
    values = np.array([one.value for one in ours])

    def near(estimates: list[Estimate]) -> float:
        return float(
            np.mean(np.abs(values - values.mean()) <= 2 * np.array([one.error for one in estimates]))
        )

    assert near(ours) > 0.93
    assert near(plain) < 0.85
    stated = np.sqrt(np.mean([one.error**2 for one in ours]))
    assert 0.75 < values.std(ddof=1) / stated < 1.1


def test_texts_are_taken_to_differ_by_a_quarter_at_least() -> None:
    chunks = [np.full(10, 0.2)] * 16
    assert mean(chunks).error == pytest.approx(0)
    assert mean_divergence(chunks).error == pytest.approx(0.2 * LEAST_SPREAD / 4)
    assert mean_divergence([np.zeros(10)] * 16).error == 0


def test_quantiles() -> None:
    random = np.random.default_rng(3)
    estimates = [quantile(list(random.exponential(size=(30, 40))), 0.9) for _ in range(40)]
    values = [estimate.value for estimate in estimates]
    assert np.mean(values) == pytest.approx(math.log(10), rel=0.03)
    assert np.mean([e.error for e in estimates]) == pytest.approx(np.std(values, ddof=1), rel=0.35)
