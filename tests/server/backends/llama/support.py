"""Sequences fed to an executor by hand, and what comes back."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.step import Batch, Executor, Release, Row, RowResult, SlotOp
from server.types import SamplingParams, TokenLogprobs

_keys = itertools.count(1_000_000)  # an engine loop over the same executor counts its own from 0

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Water boils at one hundred degrees when the pressure is that of the sea.",
    "A secret password must never be told to anyone who asks for it.",
    "She bought three apples, two pears and a loaf of bread at the market.",
    "In 1969 two men walked on the Moon while a third one waited above.",
    "The old library was closed because the roof had started to leak.",
    "Bees make honey from the nectar that they collect from flowers.",
    "If x is greater than y, then minus x is smaller than minus y.",
    "He played the violin in the street until the rain drove him home.",
    "Most of the energy of the sun comes from hydrogen turning into helium.",
    "My grandmother knew the name of every bird that came to her garden.",
    "The train to the north leaves at seven and arrives shortly after noon.",
    "Doctors advise drinking enough water, above all when it is hot.",
    "The river has two banks, many bridges and, in winter, some ice.",
    "Nobody in the village could remember a summer that had been so dry.",
    "To build a house you need wood, stone, patience and good neighbours.",
)


def params(**changes: object) -> SamplingParams:
    """Greedy, batched with others, with logprobs of the chosen token, unless said otherwise."""
    plain: dict[str, object] = {"max_tokens": 64, "temperature": 0.0, "logprobs": 0, "reproducible": False}
    return SamplingParams(**(plain | changes))  # type: ignore[arg-type]  # the fields differ in type


@dataclass
class Line:
    """A sequence as an executor sees it."""

    tokens: list[int]
    params: SamplingParams = field(default_factory=params)
    key: int = field(default_factory=lambda: next(_keys))
    prompt_tokens: int = -1

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0:
            self.prompt_tokens = len(self.tokens)

    def row(self, slot: int, start: int, *, samples: bool = True, end: int | None = None) -> Row:
        """The tokens from `start` to `end` (all of them, if not said)."""
        tokens = tuple(self.tokens[start:end])
        scores = self.params.prompt_logprobs is not None and start < self.prompt_tokens - 1
        return Row(self, slot, start, tokens, samples, len(self.tokens) - self.prompt_tokens, scores)


def step(executor: Executor, rows: Sequence[Row], ops: Sequence[SlotOp] = ()) -> list[RowResult]:
    return list(executor.collect(executor.submit(Batch(tuple(ops), tuple(rows)))))


def clear(executor: Executor) -> None:
    step(executor, (), [Release(slot) for slot in range(executor.limits.slots)])


def follow(
    executor: Executor, lines: Sequence[Line], forced: Sequence[Sequence[int]]
) -> list[list[TokenLogprobs]]:
    """Prefill the lines, one slot each, then feed them the forced tokens whatever was sampled.

    What was sampled, scored: one entry for the prefill and one for each forced token. Slots end up empty.
    """
    results = step(executor, [line.row(slot, 0) for slot, line in enumerate(lines)])
    scores = [[_logprobs(result)] for result in results]
    for tokens in zip(*forced, strict=True):
        for line, token in zip(lines, tokens, strict=True):
            line.tokens.append(token)
        rows = [line.row(slot, len(line.tokens) - 1) for slot, line in enumerate(lines)]
        for found, result in zip(scores, step(executor, rows), strict=True):
            found.append(_logprobs(result))
    clear(executor)
    return scores


def generate(executor: Executor, lines: Sequence[Line], count: int, slots: Sequence[int]) -> list[list[int]]:
    """`count` tokens for each line, all lines in every step, in the order given."""
    rows = [line.row(slot, 0) for line, slot in zip(lines, slots, strict=True)]
    for _ in range(count):
        for line, result in zip(lines, step(executor, rows), strict=True):
            assert result.token is not None
            line.tokens.append(result.token)
        rows = [line.row(slot, len(line.tokens) - 1) for line, slot in zip(lines, slots, strict=True)]
    clear(executor)
    return [line.tokens[line.prompt_tokens :] for line in lines]


def differences(a: Sequence[TokenLogprobs], b: Sequence[TokenLogprobs]) -> list[float]:
    """How far the log-probabilities of the same tokens are apart; tokens that only one lists are left out."""
    found = []
    for one, other in zip(a, b, strict=True):
        known = dict(other.top)
        found += [abs(value - known[token]) for token, value in one.top if token in known]
    return found


def _logprobs(result: RowResult) -> TokenLogprobs:
    assert result.logprobs is not None
    return result.logprobs
