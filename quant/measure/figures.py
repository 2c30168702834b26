"""From comparisons to the figures of a measurement."""

import math
from collections.abc import Sequence

import numpy as np

from quant.measure.estimate import Estimate, Values, mean, mean_difference, mean_divergence, quantile
from quant.measure.measurement import Divergence, Figure, Greedy, Histogram, Perplexity
from quant.measure.score import Comparison, Reference
from quant.measure.text import Text

EDGES = tuple(np.arange(-8.0, 1.75, 0.25).tolist())  # powers of ten, in nats
LOOP_TOKENS, LOOP_TIMES = 16, 4  # a text ends in a loop where a period of so many tokens at most is repeated


def figure(estimate: Estimate, scale: float = 1.0) -> Figure:
    """One text alone has no error that could be told: it counts as all of the value."""
    error = estimate.error if math.isfinite(estimate.error) else abs(estimate.value)
    return Figure(round(scale * estimate.value, 7), round(scale * error, 7))


def divergence_of(found: Comparison, source: Reference) -> Divergence:
    values = found.divergence
    return Divergence(
        mean=figure(mean_divergence(values)),
        median=figure(quantile(values, 0.5)),
        p90=figure(quantile(values, 0.9)),
        p99=figure(quantile(values, 0.99)),
        p999=figure(quantile(values, 0.999)),
        max=round(max(float(chunk.max()) for chunk in values), 6),
        tail=figure(mean(found.tail)),
        rest=round(float(np.mean(np.concatenate([np.exp(chunk.rest) for chunk in source.chunks]))), 8),
        histogram=histogram(values),
    )


def histogram(chunks: Sequence[Values]) -> Histogram:
    powers = np.log10(np.maximum(np.concatenate([np.asarray(chunk) for chunk in chunks]), 10.0 ** EDGES[0]))
    counts, _ = np.histogram(np.clip(powers, EDGES[0], EDGES[-1]), EDGES)
    return Histogram(edges=EDGES, counts=tuple(counts.tolist()))


def ratio(change: Estimate) -> Figure:
    """Of perplexities, from the difference of their logarithms."""
    value = math.exp(min(change.value, 50.0))
    return figure(Estimate(value, value * change.error))


def perplexity(name: str, text: Text, ours: Sequence[Values], theirs: Sequence[Values]) -> Perplexity:
    """From -log p of each scored token, by chunks: the variant's and the source's."""
    estimate, change = mean(ours), mean_difference(ours, theirs)
    value = math.exp(min(estimate.value, 50.0))
    return Perplexity(
        name=name,
        value=value,
        error=value * (estimate.error if math.isfinite(estimate.error) else 1.0),
        source=math.exp(min(mean(theirs).value, 50.0)),
        ln_change=figure(change),
        tokens=text.scored,
        cut=text.cut,
        corpus=text.corpus,
        tokenizer=text.tokenizer,
    )


def by_text(found: Comparison) -> tuple[tuple[float, int], ...]:
    return tuple((round(float(chunk.mean(dtype=np.float64)), 6), len(chunk)) for chunk in found.divergence)


def joined(parts: Sequence[Comparison]) -> Comparison:
    names = ("divergence", "agrees", "overlap", "surprise", "source_surprise", "tail")
    return Comparison(**{name: tuple(c for part in parts for c in getattr(part, name)) for name in names})


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """How many tokens come before the first that differs; None where there is none."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def greedy_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> Greedy:
    """(variant's answer, source's answer) to the same prompts."""
    found = [first_difference(ours, theirs) for ours, theirs in pairs]
    places = [place for place in found if place is not None]
    return Greedy(
        answers=len(pairs),
        same=len(found) - len(places),
        median_first_difference=float(np.median(places)) if places else None,
        length=length,
    )


def ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Whether a period repeats at the end, with at least 16 tokens together."""
    for period in range(1, LOOP_TOKENS + 1):
        needed = max(LOOP_TIMES * period, LOOP_TOKENS)
        tail = tokens[-needed:]
        if len(tail) == needed and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False
