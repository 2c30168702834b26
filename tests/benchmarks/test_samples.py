"""Samples of texts whose spread is known."""

import numpy as np
import pytest

from benchmarks.samples import judged, samples_of


def texts(levels: "np.ndarray", each: int, seed: int) -> list[np.ndarray]:
    """Texts of very different lengths; each sample of `each` texts has the next level."""
    dice = np.random.default_rng(seed)
    return [
        dice.gamma(2.0, (level + dice.gamma(2.0, 0.02)) / 2, size=int(dice.geometric(0.02)))
        for level in levels
        for _ in range(each)
    ]


def test_right_errors_are_found_right() -> None:
    samples = samples_of(texts(np.full(20, 0.1), 24, seed=3), 20)
    assert len(samples) == 20
    pooled, near, ratio = judged(samples)
    assert pooled == pytest.approx(0.14, rel=0.05)
    assert near >= 17
    assert 0.6 <= ratio <= 1.5


def test_texts_that_are_alike_within_a_sample_show() -> None:
    """Their errors are too small: samples differ by more than they say."""
    levels = np.random.default_rng(4).gamma(2.0, 0.05, 20)
    _, near, ratio = judged(samples_of(texts(levels, 24, seed=5), 20))
    assert near < 17
    assert ratio > 1.5
