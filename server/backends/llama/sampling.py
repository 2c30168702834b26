"""Choosing a token from one row of logits. numpy only.

Nothing here remembers random state: a token depends on the logits, the parameters and the pair
(seed, draw), so a sequence that is preempted and computed again, or shares its steps with others, gets
the same answer. Full-vocabulary passes write into one buffer and reduce over stripes (axis 0), which numpy
vectorises: allocating, partitioning or summing a whole vocabulary costs several times as much.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from server.types import SamplingParams, TokenLogprobs

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

COLDEST = 1e-6  # a smaller temperature would overflow float32; the choice is the greedy one long before
STRIPES = 64
FEW = 256
WIDE = 1024  # from so many stripes on, a vocabulary of 64 k, looking at a few of them beats looking at all
MASK = (1 << 64) - 1


class BadLogits(ArithmeticError):
    """The model computed something that is no distribution: NaN, or nothing above minus infinity."""


def uniform(seed: int, draw: int) -> float:
    """Number `draw` of the random sequence `seed`, in [0, 1): splitmix64 used as a counter-based generator.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014. The seed is mixed first,
    so that neighbouring seeds do not give shifted copies of one sequence.
    """
    return (_mix(_mix(seed) + draw) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    z = (value + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def greedy(rows: Logits) -> list[int]:
    """The most likely token of each row; the lowest id wins a tie. Raises BadLogits."""
    chosen: list[int] = rows.argmax(axis=1).tolist()
    for place, token in enumerate(chosen):
        _check(rows.item(place, token))  # argmax stops at a NaN, so the value it chose tells
    return chosen


def _check(largest: float) -> None:
    if not math.isfinite(largest):
        raise BadLogits("the model's logits are not finite numbers")


def banned(mask: bytes, size: int) -> NDArray[np.bool_]:
    """Which of `size` tokens a mask (server.engine.step.Mask) forbids."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=min(size, 8 * len(mask)), bitorder="little")
    result = np.ones(size, np.bool_)
    np.equal(bits, 0, out=result[: len(bits)])
    return result


def top_ids(values: Logits, count: int) -> Ids:
    """Ids of the `count` largest values, largest first; the lower id first where they are equal."""
    count = min(count, len(values))
    width = len(values) // STRIPES
    if width < 2 * count:
        candidates = np.flatnonzero(values >= _nth_largest(values, count))
    else:
        candidates = _reaching(values, count, width)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _nth_largest(values: Logits, n: int) -> np.float32:
    place = len(values) - n
    nth: np.float32 = np.partition(values, place)[place]
    return nth


def _reaching(values: Logits, count: int, width: int) -> Ids:
    """At least `count` ids, ascending, of values that no value left out exceeds.

    The maxima of disjoint stripes are some of the values, so the `count`-th largest of them is reached by at
    least `count` values; and only in stripes whose maximum reaches it.
    """
    whole = width * STRIPES
    table = values[:whole].reshape(STRIPES, width)
    maxima = table.max(axis=0)
    bound = _nth_largest(maxima, count)
    if width < WIDE:
        return np.flatnonzero(values >= bound)
    columns = np.flatnonzero(maxima >= bound)
    lines, places = np.nonzero(table[:, columns] >= bound)
    found = lines * width + columns[places]
    rest = np.flatnonzero(values[whole:] >= bound)
    return np.concatenate((found, rest + whole))


def pick(weights: Logits, point: float) -> int:
    """An index with probability proportional to its weight: the one that `point`, in [0, 1), falls on.

    The line on which it falls is laid out stripe by stripe, so that no running sum over all is needed.
    """
    width = len(weights) // STRIPES
    if width < STRIPES:
        return _pick(weights, point * float(weights.sum(dtype=np.float64)))
    whole = width * STRIPES
    table, rest = weights[:whole].reshape(STRIPES, width), weights[whole:]
    running = np.cumsum(table.sum(axis=0), dtype=np.float64)
    striped = float(running[-1])
    target = point * (striped + (float(rest.sum()) if len(rest) else 0.0))
    if target >= striped and rest.any():
        return whole + _pick(rest, target - striped)
    column = _passing(running, target)
    before = float(running[column - 1]) if column else 0.0
    return _pick(table[:, column], target - before) * width + column


def _pick(weights: Logits, target: float) -> int:
    return _passing(np.cumsum(weights, dtype=np.float64), target)


def _passing(running: NDArray[np.float64], target: float) -> int:
    """Where the running sum passes the target; where it last grew, if rounding put that past its end."""
    index = int(np.searchsorted(running, target, side="right"))
    if index < len(running):
        return index
    return int(np.searchsorted(running, running[-1], side="left"))


def total(weights: Logits) -> float:
    """Sum of the weights."""
    width = len(weights) // STRIPES
    if not width:
        return float(weights.sum(dtype=np.float64))
    whole = width * STRIPES
    sums = weights[:whole].reshape(STRIPES, width).sum(axis=0)
    return float(sums.sum(dtype=np.float64)) + float(weights[whole:].sum())


def nucleus(weights: Logits, share: float) -> Ids:
    """Ids of the fewest largest weights that hold `share` of the total, largest first; at least one.

    `weights` are relative to the largest, which is 1. Those below (1 - share) / n of the total hold less than
    1 - share together, so they are never needed; most distributions need far fewer, so try those first.
    """
    whole = total(weights)
    needed = share * whole
    for floor in (2.0**-5, 2.0**-10, (1.0 - share) / len(weights) * whole):
        candidates = np.flatnonzero(weights >= floor)
        if float(weights[candidates].sum(dtype=np.float64)) > needed:
            break
    found = _descending(weights, candidates)
    running = np.cumsum(weights[found], dtype=np.float64)
    return found[: int(np.searchsorted(running, needed, side="left")) + 1]


def _descending(weights: Logits, ids: Ids) -> Ids:
    """The ids by falling weight, then rising id.

    Positive floats sort like their bits read as integers, and numpy sorts integers faster.
    """
    bits = weights[ids].view(np.uint32).astype(np.uint64)
    keys = (~bits << np.uint64(32)) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


class Tally:
    """How often each token occurs in a stretch of one sequence that only grows at its end."""

    def __init__(self, start: int) -> None:
        self._end = start  # positions from here on are not counted yet
        self._place: dict[int, int] = {}
        self._ids = np.zeros(16, np.int64)
        self._counts = np.zeros(16, np.float32)

    def advance(self, tokens: Sequence[int], end: int) -> tuple[Ids, Logits]:
        """The distinct tokens up to position `end` and their counts. `end` never falls."""
        for token in tokens[self._end : end]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
            self._counts[place] += 1
        self._end = max(self._end, end)
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


class Sampler:
    """Chooses the tokens of one sequence.

    Order of operations: mask, logit bias, repetition penalty (prompt and answer), frequency and presence
    penalty (answer), temperature, top-k, top-p, min-p. `scratch` is a buffer of the vocabulary's size that
    all samplers of an executor share; logits are never written to.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int, scratch: Logits) -> None:
        self.params = params
        self._scratch = scratch
        bias = {token: value for token, value in params.logit_bias if 0 <= token < len(scratch)}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._everything = Tally(0) if params.repetition_penalty != 1.0 else None
        penalized = params.presence_penalty or params.frequency_penalty
        self._answer = Tally(prompt_tokens) if penalized else None
        self._adjusts = bool(bias) or self._everything is not None or self._answer is not None
        self.simple = params.temperature == 0.0 and not self._adjusts and params.logprobs is None
        """No more than `greedy`, which does many rows at once."""

    def choose(
        self, logits: Logits, tokens: Sequence[int], end: int, draw: int, mask: bytes | None = None
    ) -> int:
        """The token at position `end`, given the tokens and the logits before it. Raises BadLogits."""
        if self._adjusts or mask is not None:
            logits = self._adjusted(logits, tokens, end, mask)
        if self.params.temperature == 0.0:
            return greedy(logits[None])[0]
        return self._sample(logits, uniform(self.params.seed, draw))

    def _adjusted(self, logits: Logits, tokens: Sequence[int], end: int, mask: bytes | None = None) -> Logits:
        out, params = self._scratch, self.params
        np.copyto(out, logits)
        if mask is not None:
            np.copyto(out, -np.inf, where=banned(mask, len(out)))
        out[self._bias_ids] += self._bias
        if self._everything is not None:
            ids, _ = self._everything.advance(tokens, end)
            values, penalty = out[ids], np.float32(params.repetition_penalty)
            out[ids] = np.where(values > 0, values / penalty, values * penalty)
        if self._answer is not None:
            ids, counts = self._answer.advance(tokens, end)
            out[ids] -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
        return out

    def _sample(self, logits: Logits, point: float) -> int:
        params, largest = self.params, logits.max()
        _check(float(largest))
        if 0 < params.top_k <= FEW:
            few = top_ids(logits, params.top_k)
            return int(few[pick_of_few(logits[few].tolist(), params, point)])
        ids = top_ids(logits, params.top_k) if 0 < params.top_k < len(logits) else None
        weights = self._weights(logits, largest)  # may write over the logits, if they were adjusted
        weights = weights if ids is None else weights[ids]
        if params.top_p < 1.0:
            kept = nucleus(weights, params.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if params.min_p > 0.0:
            kept = np.flatnonzero(weights >= params.min_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        choice = pick(weights, point)
        return choice if ids is None else int(ids[choice])

    def _weights(self, logits: Logits, largest: np.float32) -> Logits:
        """Probabilities relative to the largest one, which is 1."""
        out = self._scratch
        np.subtract(logits, largest, out=out)
        if self.params.temperature != 1.0:
            np.multiply(out, np.float32(1.0 / max(self.params.temperature, COLDEST)), out=out)
        return np.exp(out, out=out)


def pick_of_few(falling: list[float], params: SamplingParams, point: float) -> int:
    """Which of a few logits, largest first, `point` picks after temperature, top-p and min-p.

    In plain Python: for some tens of values that takes a third of the time of ten numpy calls.
    """
    scale, largest = 1.0 / max(params.temperature, COLDEST), falling[0]
    weights = [math.exp((value - largest) * scale) for value in falling]
    running = list(accumulate(weights))
    size = len(weights) if params.top_p >= 1.0 else bisect_left(running, params.top_p * running[-1]) + 1
    if params.min_p > 0.0:
        size = min(size, sum(weight >= params.min_p for weight in weights))
    return bisect_right(running, point * running[size - 1], 0, size - 1)


def log_total(logits: Logits, scratch: Logits) -> float:
    """Logarithm of the sum of exponentials: subtracted from logits, log-probabilities. Raises BadLogits."""
    largest = logits.max()
    _check(float(largest))
    np.subtract(logits, largest, out=scratch)
    np.exp(scratch, out=scratch)
    return float(largest) + math.log(total(scratch))


def candidate_logs(logits: Logits, ids: bytes, scratch: Logits) -> bytes:
    """What TokenLogprobs.candidates holds, for distinct `ids` of Candidates. Raises BadLogits."""
    norm = log_total(logits, scratch)
    places = np.frombuffer(ids, "<i4")
    logs = np.empty(len(places) + 1, "<f4")
    np.subtract(logits[places], norm, out=logs[:-1])
    scratch[places] = 0.0  # what log_total left: probabilities, relative to the largest
    rest = total(scratch)
    logs[-1] = math.log(rest) + float(logits.max()) - norm if rest > 0.0 else -math.inf
    return logs.tobytes()


def score(logits: Logits, token: int, count: int, scratch: Logits) -> TokenLogprobs:
    """Log-probabilities of the token and of the `count` most likely ones. Raises BadLogits."""
    norm, own = log_total(logits, scratch), logits[token]
    ids = top_ids(logits, count) if count else np.empty(0, np.int64)
    likely = zip(ids.tolist(), logits[ids].tolist(), strict=True)
    return TokenLogprobs(
        float(own) - norm,
        tuple((i, value - norm) for i, value in likely),
        1 + int(np.count_nonzero(logits > own)),
    )
