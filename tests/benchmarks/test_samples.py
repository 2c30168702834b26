"""Samples of texts whose spread is known."""

import numpy as np
import pytest

from benchmarks.samples import judged, samples_of


def test_right_errors_are_found_right() -> None:
    dice = np.random.default_rng(3)
    texts = [(float(value), 40) for value in dice.normal(0.1, 0.03, size=20 * 16)]
    samples = samples_of(texts, 20)
    assert len(samples) == 20
    pooled, near, ratio = judged(samples)
    assert pooled == pytest.approx(0.1, rel=0.05)
    assert near >= 17
    assert 0.6 <= ratio <= 1.5


def test_texts_that_are_alike_within_a_sample_show() -> None:
    """Their errors are too small: samples differ by more than they say."""
    dice = np.random.default_rng(4)
    texts = [
        (level + float(dice.normal(0, 0.001)), 40) for level in dice.gamma(2.0, 0.05, 20) for _ in range(16)
    ]
    _, near, ratio = judged(samples_of(texts, 20))
    assert near < 17
    assert ratio > 1.5
