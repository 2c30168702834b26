"""Steps of the engine on llama.cpp: rows of many sequences in one forward pass, tokens sampled here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from server.backends.llama.context import LlamaContext
from server.backends.llama.model import LlamaModel
from server.backends.llama.options import PAGE
from server.backends.llama.sampling import BadLogits, Sampler, candidate_logs, greedy, score
from server.engine.step import (
    Batch,
    CopyPrefix,
    Release,
    Row,
    RowResult,
    SequenceView,
    SlotOp,
    StepFailed,
    Trim,
)
from server.types import Limits, TokenLogprobs


class Span(NamedTuple):
    """Tokens `low` to `high` of the batch's row number `number`, computed in one pass."""

    number: int
    row: Row
    low: int
    high: int
    scored: int  # so many of them, the first ones, score the prompt token that follows
    samples: bool

    @property
    def outputs(self) -> int:
        return self.scored + self.samples


@dataclass(slots=True)
class Step:
    """A step under way. All its passes are computed; the results of the last are still to be read."""

    rows: tuple[Row, ...]
    last: list[Span]
    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None]
    scores: dict[int, list[TokenLogprobs]]  # by row index
    masks: dict[int, bytes] = field(default_factory=dict)  # of the last pass, by row index


class LlamaExecutor:
    """server.engine.step.Executor. One step at a time: on a CPU `submit` computes, `collect` samples.

    Slot operations of a step are done even if the step then fails; of its rows nothing is left.
    """

    depth = 1

    def __init__(self, model: LlamaModel, context: LlamaContext, limits: Limits) -> None:
        self.limits = limits
        self._model = model
        self._context = context
        self._held = [0] * limits.slots  # tokens in each slot
        self._samplers: dict[int, Sampler] = {}
        self._scratch = np.zeros(model.vocab_size, np.float32)

    def submit(self, batch: Batch) -> object:
        for op in batch.ops:
            self._apply(op)
        for row in batch.rows:
            assert self._held[row.slot] == row.start, "a row starts where its slot ends"
        count = len(batch.rows)
        step = Step(batch.rows, [], [None] * count, [None] * count, {})
        try:
            for spans in _passes(batch.rows, self._context.outputs):
                self._read(step)
                self._compute(spans)
                step.last = spans
        except StepFailed:
            self._undo(batch.rows)
            raise
        for row in batch.rows:
            self._held[row.slot] += len(row.tokens)
        return step

    def collect(self, ticket: object) -> Sequence[RowResult]:
        assert isinstance(ticket, Step)
        try:
            self._read(ticket)
        except StepFailed:
            self._undo(ticket.rows)
            raise
        if not ticket.scores:
            return [RowResult(*pair) for pair in zip(ticket.tokens, ticket.logprobs, strict=True)]
        return [
            RowResult(token, logprobs, tuple(ticket.scores.get(index, ())))
            for index, (token, logprobs) in enumerate(zip(ticket.tokens, ticket.logprobs, strict=True))
        ]

    def forget(self, key: int) -> None:
        self._samplers.pop(key, None)

    def close(self) -> None:
        self._context.close()
        self._model.close()

    # -- slots ------------------------------------------------------------------------------------

    def _apply(self, op: SlotOp) -> None:
        match op:
            case Release(slot):
                self._held[slot] = 0
            case Trim(slot, keep):
                self._held[slot] = min(keep, self._held[slot])
            case CopyPrefix(source, target, count):
                assert not self._held[target], "the target of a copy is empty"
                assert self._held[source] >= count, "the source of a copy holds the prefix"
                self._held[target] = count
        self._context.apply(op)

    def _undo(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            self._context.cut(row.slot, row.start)
            self._held[row.slot] = row.start

    # -- passes -----------------------------------------------------------------------------------

    def _compute(self, spans: list[Span]) -> None:
        batch = self._context.batch
        batch.clear()
        for span in spans:
            row, low = span.row, span.low
            tokens = row.tokens if span.high - low == len(row.tokens) else row.tokens[low : span.high]
            batch.append(tokens, row.start + low, row.slot, span.scored, span.samples)
        self._context.decode()

    def _read(self, step: Step) -> None:
        """Turn the logits of the pass computed last into tokens and scores. Raises StepFailed."""
        outputs = sum(span.outputs for span in step.last)
        if not outputs:
            return
        step.masks = _masks(step.last)  # while a GPU may still compute
        logits = self._context.logits(outputs)
        try:
            self._choose(step, logits)
        except BadLogits as error:
            raise StepFailed(str(error)) from None

    def _choose(self, step: Step, logits: NDArray[np.float32]) -> None:
        place = 0
        simple: list[tuple[int, int]] = []  # row index, place: no more than an argmax
        for span in step.last:
            if span.scored:
                step.scores.setdefault(span.number, []).extend(self._score(span, logits[place:]))
                place += span.scored
            if span.samples:
                sequence = span.row.sequence
                sampler = self._sampler(sequence)
                if sampler.simple and span.number not in step.masks:
                    simple.append((span.number, place))
                else:
                    self._sample(step, span, sampler, logits[place])
                place += 1
        self._argmax(step, simple, logits)

    def _argmax(self, step: Step, simple: list[tuple[int, int]], logits: NDArray[np.float32]) -> None:
        if len(simple) == len(logits):
            chosen = greedy(logits)
        else:
            chosen = [greedy(logits[place : place + 1])[0] for _, place in simple]
        for (index, _), token in zip(simple, chosen, strict=True):
            step.tokens[index] = token

    def _sample(self, step: Step, span: Span, sampler: Sampler, logits: NDArray[np.float32]) -> None:
        row = span.row
        mask = step.masks.get(span.number)
        end = row.start + len(row.tokens)
        token = sampler.choose(logits, row.sequence.tokens, end, row.draw, mask)
        step.tokens[span.number] = token
        if (count := sampler.params.logprobs) is not None:
            step.logprobs[span.number] = score(logits, token, count, self._scratch)

    def _score(self, span: Span, logits: NDArray[np.float32]) -> Iterator[TokenLogprobs]:
        first = span.row.start + span.low + 1
        following = span.row.sequence.tokens[first : first + span.scored]
        params = span.row.sequence.params
        for place, (line, token) in enumerate(zip(logits, following, strict=False)):
            found = score(line, token, params.prompt_logprobs or 0, self._scratch)
            if params.prompt_candidates and (ids := params.prompt_candidates.at(first + place)):
                found = replace(found, candidates=candidate_logs(line, ids, self._scratch))
            yield found

    def _sampler(self, sequence: SequenceView) -> Sampler:
        if (sampler := self._samplers.get(sequence.key)) is None:
            sampler = Sampler(sequence.params, sequence.prompt_tokens, self._scratch)
            self._samplers[sequence.key] = sampler
        return sampler


def _masks(spans: list[Span]) -> dict[int, bytes]:
    """The masks of the rows that sample under one."""
    masks: dict[int, bytes] = {}
    for span in spans:
        if span.samples and span.row.mask is not None and (mask := span.row.mask()) is not None:
            masks[span.number] = mask
    return masks


def _passes(rows: tuple[Row, ...], outputs: int) -> Iterator[list[Span]]:
    """The rows as forward passes of at most so many outputs each: the reproducible ones one by one.

    In order of slots: llama.cpp computes neighbouring sequences together where each has its own memory.
    """
    ordered = sorted(enumerate(rows), key=lambda pair: pair[1].slot)
    if not any(row.sequence.params.reproducible for row in rows):
        yield from _together(ordered, outputs)
        return
    yield from _together([pair for pair in ordered if not pair[1].sequence.params.reproducible], outputs)
    for number, row in ordered:
        if row.sequence.params.reproducible:
            yield from _alone(number, row, outputs)


def _together(rows: list[tuple[int, Row]], outputs: int) -> Iterator[list[Span]]:
    """One pass, unless long prompts are scored."""
    if rows and not any(row.wants_prompt_logprobs for _, row in rows):
        yield [Span(i, row, 0, len(row.tokens), 0, row.samples) for i, row in rows]
        return
    spans: list[Span] = []
    room = outputs
    for index, row in rows:
        low, size = 0, len(row.tokens)
        scored = _scored(row, 0, size)
        while low < size:
            if not room:
                yield spans
                spans, room = [], outputs
            high = min(size, low + room) if scored else size
            span = Span(index, row, low, high, max(0, min(high, scored) - low), row.samples and high == size)
            spans.append(span)
            room -= high - low if scored else row.samples
            low = high
    if spans:
        yield spans


def _alone(number: int, row: Row, outputs: int) -> Iterator[list[Span]]:
    """Forward passes that do not depend on the company: one row, a prompt cut at every page.

    llama.cpp rounds a row differently in passes of other sizes, and a rounding of 1e-6 grows: activations are
    quantized to 8 bits, so that it moves log-probabilities by some hundredths a few layers later.
    """
    low, size = 0, len(row.tokens)
    while low < size:
        high = min(size, low + min(outputs, _piece(row, row.start + low)))
        yield [Span(number, row, low, high, _scored(row, low, high), row.samples and high == size)]
        low = high


def _piece(row: Row, position: int) -> int:
    """Tokens of the pass that starts there. An answer is computed again as it was: token by token."""
    left = row.sequence.prompt_tokens - position
    return min(PAGE - position % PAGE, left) if left > 0 else 1


def _scored(row: Row, low: int, high: int) -> int:
    """How many of the row's tokens `low` to `high` score the prompt token that follows them."""
    if not row.wants_prompt_logprobs:
        return 0
    return max(0, min(high, row.sequence.prompt_tokens - 1 - row.start) - low)
