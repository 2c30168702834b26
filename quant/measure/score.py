"""How far a variant's next-token probabilities are from its source's: KL divergence, agreement, perplexity.

What the source says is computed once per text and kept: its `KEPT` most probable tokens and the sum of the
rest, which counts as one event r. By the chain rule the exact divergence is

    KL(p || q) = sum over kept p ln(p / q)  +  p(r) ln(p(r) / q(r))  +  p(r) KL(p(. | r) || q(. | r))

of which the last part is left out: the figure is never above the exact one, and below it by the rest's
probability times how far the two tails are apart. Where the text was sampled from the source, the text's own
tokens outside the kept ones estimate that part without bias (`Comparison.tail`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quant.errors import BuildFailed
from quant.measure.estimate import Estimate, mean, mean_difference, mean_divergence, quantile
from quant.measure.text import Chunk, Text

Singles = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
KEPT = 512
BEST = 5
SMALLEST = -103.0  # ln of float32's smallest positive number


class Scorer(Protocol):
    """A model that reads texts. `server` has one that asks an engine; here are those for torch and GGUF."""

    def __call__(self, tokens: Sequence[int]) -> Singles:
        """[tokens, vocabulary]: after each token the log-probabilities of the next, up to a constant a row.

        May be overwritten by the next call.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the source says in one chunk, a row for each scored token."""

    tokens: Ids  # [scored, kept]: the most probable ones, in no order
    logs: Singles  # [scored, kept]: their log-probabilities
    rest: Singles  # [scored]: log of all other tokens' probability; -inf where none is left
    target: Singles  # [scored]: log-probability of the token that follows in the text
    best: Ids  # [scored, BEST]: the most probable tokens, best first


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What a variant says in one chunk, a row for each scored token."""

    logs: Singles  # [scored, kept]: log-probabilities of the source's tokens, in the same order
    rest: Singles  # [scored]: log of all other tokens' probability
    target: Singles  # [scored]: log-probability of the token that follows in the text
    best: Ids  # [scored, BEST]: the most probable tokens, best first


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    text: Text
    chunks: tuple[Expected, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A variant against its source, token by token: one array a chunk, a value for each scored token."""

    divergence: tuple[Singles, ...]  # KL(source || variant) in nats
    agrees: tuple[npt.NDArray[np.bool_], ...]  # the most probable token is the same
    overlap: tuple[Singles, ...]  # share of the source's BEST most probable tokens among the variant's
    surprise: tuple[Singles, ...]  # the variant's -log p of the text's token
    source_surprise: tuple[Singles, ...]
    tail: tuple[Singles, ...]  # what `divergence` leaves out, estimated by the text's token; most are 0

    def score(self) -> "Score":
        return Score(
            mean=mean_divergence(self.divergence),
            median=quantile(self.divergence, 0.5),
            p90=quantile(self.divergence, 0.9),
            p99=quantile(self.divergence, 0.99),
            p999=quantile(self.divergence, 0.999),
            max=max(float(chunk.max()) for chunk in self.divergence),
            top1=mean(self.agrees),
            top5=mean(self.overlap),
            log_perplexity=mean(self.surprise),
            log_perplexity_change=mean_difference(self.surprise, self.source_surprise),
            tokens=sum(len(chunk) for chunk in self.divergence),
        )

    def further_than(self, other: "Comparison", factor: float = 1.0) -> Estimate:
        """Mean divergence less `factor` times the other's, with its paired error. Same reference only."""
        return mean_difference(self.divergence, other.divergence, factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Divergences in nats per token, perplexities as natural logarithms."""

    mean: Estimate
    median: Estimate
    p90: Estimate
    p99: Estimate
    p999: Estimate
    max: float
    top1: Estimate
    top5: Estimate
    log_perplexity: Estimate
    log_perplexity_change: Estimate
    tokens: int


def reference(scorer: Scorer, text: Text, *, kept: int = KEPT) -> Reference:
    """What `scorer` says, to compare others with. Raises BuildFailed where its numbers are not finite."""
    chunks = tuple(_expected(_rows(scorer, chunk), chunk, kept) for chunk in text.chunks)
    return Reference(text, chunks)


def compare(scorer: Scorer, source: Reference) -> Comparison:
    """`scorer` on the reference's text. Raises BuildFailed where its numbers are not finite."""
    pairs = zip(source.text.chunks, source.chunks, strict=True)
    return compare_answers((_answered(_rows(scorer, chunk), chunk, kept) for chunk, kept in pairs), source)


def compare_answers(answers: Iterable[Answered], source: Reference) -> Comparison:
    """One answer for each chunk of the reference."""
    pairs = list(zip(answers, source.chunks, strict=True))
    divergence = tuple(_divergence(expected, found.logs, found.rest) for found, expected in pairs)
    return Comparison(
        divergence=divergence,
        agrees=tuple(found.best[:, 0] == expected.best[:, 0] for found, expected in pairs),
        overlap=tuple(_overlap(found.best, expected.best) for found, expected in pairs),
        surprise=tuple(-found.target for found, _ in pairs),
        source_surprise=tuple(-expected.target for _, expected in pairs),
        tail=tuple(
            _tail(found, expected, _targets(chunk))
            for (found, expected), chunk in zip(pairs, source.text.chunks, strict=True)
        ),
    )


def surprises(scorer: Scorer, text: Text) -> tuple[Singles, ...]:
    """-log p of each scored token, an array a chunk."""
    return tuple(-_logs_of(_rows(scorer, chunk), _targets(chunk))[:, 0] for chunk in text.chunks)


def _rows(scorer: Scorer, chunk: Chunk) -> Singles:
    """Those that predict the scored tokens, their largest number 0."""
    rows = scorer(chunk.tokens)[chunk.first - 1 : -1]
    shifted: Singles = rows - rows.max(axis=1, keepdims=True)
    if not np.isfinite(shifted).all():
        raise BuildFailed("the model's output holds NaN or infinity")
    return shifted


def _targets(chunk: Chunk) -> Ids:
    return np.array(chunk.tokens[chunk.first :], np.int32)[:, None]


def _expected(rows: Singles, chunk: Chunk, kept: int) -> Expected:
    tokens = np.argpartition(rows, -min(kept, rows.shape[1]), axis=1)[:, -kept:].astype(np.int32)
    target = _logs_of(rows, _targets(chunk))[:, 0]
    logs, rest = _split(rows, tokens)
    return Expected(tokens=tokens, logs=logs, rest=rest, target=target, best=_best(rows))


def _answered(rows: Singles, chunk: Chunk, expected: Expected) -> Answered:
    logs, rest = _split(rows, expected.tokens)
    target = _logs_of(rows, _targets(chunk))[:, 0]
    return Answered(logs=logs, rest=rest, target=target, best=_best(rows))


def _overlap(ours: Ids, theirs: Ids) -> Singles:
    common: Singles = (ours[:, :, None] == theirs[:, None, :]).any(axis=1).mean(axis=1, dtype=np.float32)
    return common


def _tail(found: Answered, expected: Expected, targets: Ids) -> Singles:
    """A token of the rest stands for all of it: ln p(x) - ln q(x), less what the event r has counted."""
    outside = ~(expected.tokens == targets).any(axis=1)
    apart = np.where(outside, expected.target - np.maximum(found.target, SMALLEST), 0.0)
    return np.asarray(apart - _terms(expected.rest, found.rest), np.float32)


def _best(rows: Singles) -> Ids:
    """The BEST most probable tokens, best first; of equal ones the lowest id."""
    left, every = rows.copy(), np.arange(len(rows))
    best = np.empty((len(rows), BEST), np.int32)
    for place in range(BEST):  # a few passes are quicker than a partition of the vocabulary
        best[:, place] = left.argmax(axis=1)
        left[every, best[:, place]] = -np.inf
    return best


def _logs_of(rows: Singles, tokens: Ids) -> Singles:
    """[scored, n]: log-probabilities of these tokens."""
    logs: Singles = np.take_along_axis(rows, tokens, axis=1) - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return logs


def _split(rows: Singles, tokens: Ids) -> tuple[Singles, Singles]:
    """Log-probabilities of these tokens, and the log of all others' sum."""
    weights = np.exp(rows)
    total = weights.sum(axis=1, keepdims=True)
    logs: Singles = np.take_along_axis(rows, tokens, axis=1) - np.log(total)
    np.put_along_axis(weights, tokens, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        rest: Singles = np.log(weights.sum(axis=1)) - np.log(total[:, 0])
    return logs, rest


def _divergence(expected: Expected, logs: Singles, rest: Singles) -> Singles:
    """sum p (ln p - ln q), at least 0 but for rounding."""
    total = _terms(expected.logs, logs).sum(axis=1) + _terms(expected.rest, rest)
    return np.asarray(np.maximum(total, 0.0), np.float32)


def _terms(source: Singles, variant: Singles) -> npt.NDArray[np.float64]:
    """p (ln p - ln q); 0 where p is 0. A q of 0 (beyond float32) counts as the smallest number."""
    p = np.exp(source, dtype=np.float64)
    floor = np.maximum(variant, SMALLEST)
    with np.errstate(invalid="ignore"):
        terms = p * (np.maximum(source, SMALLEST).astype(np.float64) - floor)
    return np.asarray(np.where(p > 0, terms, 0.0))
