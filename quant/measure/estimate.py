"""Means with standard errors over tokens that come in chunks.

Tokens of one chunk are alike, so the chunk is what is drawn at random, and a mean over tokens is a ratio
of chunk sums. Chunks differ much in length: an answer may have two tokens or two hundred. Then the
textbook's error of a ratio (Cochran, Sampling Techniques, 3rd edition, section 6.3) is too small, since a
long chunk draws the mean to itself, and it varies much, since few chunks decide. So two estimates are
made and the larger is taken: the jackknife, which leaves each chunk out in turn, and that of a model in
which each chunk has a level of its own and each token deviates from it (one-way analysis of variance,
unequal groups). benchmarks/samples.py shows on a real model whether they are right.

Divergences are skewed: a sample that happens to lack the few texts that suffer most has a small mean and a
small error. Nearly all samples whose mean was off by more than two errors were of this kind. So a sample is
not believed when it says that texts hardly differ: `mean_divergence` takes their levels to spread by a
quarter of the mean at least.

Two variants that were scored on the same chunks are compared by the chunks' differences, in which most of the
chunks' own spread cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float64]
Values = npt.NDArray[np.floating] | npt.NDArray[np.bool_]
RESAMPLES = 200
LEAST_SPREAD = 0.25  # of chunks' mean divergences around the mean of all, as a share of it


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    error: float  # one standard error; infinite where one chunk is all there is

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def mean(chunks: Sequence[Values]) -> Estimate:
    """Of all tokens together; one array a chunk."""
    return _mean(chunks, lambda sums: max(sums.jackknife(), sums.components()) * sums.few())


def mean_divergence(chunks: Sequence[Values]) -> Estimate:
    """The same of what is never negative, and skewed."""
    return _mean(chunks, lambda sums: max(sums.jackknife(), sums.components(), sums.least(LEAST_SPREAD)))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of chunks' tokens, and three variances of their mean."""

    value: float  # the mean
    counts: Singles
    spread: Singles  # sums less what chunks of so many tokens would have at the mean
    tokens: float  # variance of tokens around their chunks' levels

    def jackknife(self) -> float:
        """From the means without each chunk."""
        moved = -self.spread / (self.counts.sum() - self.counts)
        moved -= moved.mean()
        return (len(self.counts) - 1) / len(self.counts) * float(moved @ moved)

    def components(self) -> float:
        """From the variance of chunks' levels and that of tokens around them."""
        total, squares = self._sizes()
        between = float((self.spread**2 / self.counts).sum())
        levels = (between - (len(self.counts) - 1) * self.tokens) / (total - squares / total)
        return self._of(max(0.0, levels))

    def least(self, share: float) -> float:
        """As if levels were spread by this share of the mean."""
        return self._of((share * self.value) ** 2)

    def few(self) -> float:
        """How much more a mean scatters in units of an error that is itself estimated from few chunks; of
        unequal ones so many count as would if they were equal."""
        total, squares = self._sizes()
        return 1.0 + 1.0 / max(total**2 / squares - 2.0, 1.5)

    def _of(self, levels: float) -> float:
        total, squares = self._sizes()
        return (levels * squares + self.tokens * total) / total**2

    def _sizes(self) -> tuple[float, float]:
        return float(self.counts.sum()), float(self.counts @ self.counts)


def _mean(chunks: Sequence[Values], variance: Callable[[_Sums], float]) -> Estimate:
    counts = np.array([len(chunk) for chunk in chunks], np.float64)
    sums = np.array([np.sum(chunk, dtype=np.float64) for chunk in chunks])
    value = float(sums.sum() / counts.sum())
    if len(chunks) < 2:
        return Estimate(value, math.inf)
    within = sum(float(np.sum((np.asarray(chunk, np.float64) - np.mean(chunk)) ** 2)) for chunk in chunks)
    tokens = within / max(float(counts.sum()) - len(chunks), 1.0)
    return Estimate(value, math.sqrt(variance(_Sums(value, counts, sums - value * counts, tokens))))


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
