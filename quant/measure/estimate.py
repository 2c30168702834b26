"""Means with standard errors over tokens that come in chunks.

Tokens of one chunk are alike, so the chunk is what is drawn at random: the error of a mean is that of a ratio
of chunk sums (Cochran, Sampling Techniques, 3rd edition, section 6.3). Two variants that were scored on the
same chunks are compared by the chunks' differences, in which most of the chunks' own spread cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating] | npt.NDArray[np.bool_]
RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    error: float  # one standard error; infinite where one chunk is all there is

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def mean(chunks: Sequence[Values]) -> Estimate:
    """Of all tokens together; one array a chunk."""
    counts = np.array([len(chunk) for chunk in chunks], np.float64)
    sums = np.array([np.sum(chunk, dtype=np.float64) for chunk in chunks])
    value = float(sums.sum() / counts.sum())
    if len(chunks) < 2:
        return Estimate(value, math.inf)
    spread = sums - value * counts
    variance = len(chunks) / (len(chunks) - 1) * float(spread @ spread)
    return Estimate(value, math.sqrt(variance) / float(counts.sum()))


def mean_difference(ours: Sequence[Values], theirs: Sequence[Values], factor: float = 1.0) -> Estimate:
    """Of ours - factor * theirs, token by token. Raises ValueError for chunks of different lengths."""
    pairs = zip(ours, theirs, strict=True)
    return mean([np.subtract(a, factor * np.asarray(b, np.float64), dtype=np.float64) for a, b in pairs])


def quantile(chunks: Sequence[Values], share: float) -> Estimate:
    """The error is the spread over chunks drawn with replacement (bootstrap), from a fixed seed."""
    value = _quantile(share)(chunks)
    if len(chunks) < 2:
        return Estimate(value, math.inf)
    draws = np.random.default_rng(0).integers(len(chunks), size=(RESAMPLES, len(chunks)))
    values = [_quantile(share)([chunks[index] for index in draw]) for draw in draws]
    return Estimate(value, float(np.std(values, ddof=1)))


def _quantile(share: float) -> Callable[[Sequence[Values]], float]:
    return lambda chunks: float(np.quantile(np.concatenate([np.asarray(chunk) for chunk in chunks]), share))
