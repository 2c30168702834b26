"""Steps of the engine on torch: rows of many sequences in one forward pass, tokens sampled on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from server.backends.torch_.attention import Paged
from server.backends.torch_.inputs import Inputs, gather_inputs
from server.backends.torch_.kv import KVCache, PageTables
from server.backends.torch_.passes import Span, passes
from server.backends.torch_.results import PassResult, read_results
from server.backends.torch_.sampling import Choice, Drawer, candidate_logs, choose, score
from server.backends.torch_.transfer import numbers_to_device, to_device
from server.engine.step import Batch, Row, RowResult, SequenceView, StepFailed
from server.types import Limits

OUTPUT_BYTES = {
    "cpu": 64 << 20,
    "cuda": 512 << 20,
}  # for the logits of one pass, if scored prompts ask for many


class Replay(Protocol):
    """Decode steps prepared for certain numbers of rows."""

    def run(self, inputs: Inputs) -> Tensor | None:
        """Logits [rows, vocabulary], valid until the next call; None for a step that was not prepared."""
        ...


@dataclass(slots=True)
class Step:
    rows: tuple[Row, ...]
    results: list[PassResult] = field(default_factory=list)


class TorchExecutor:
    """server.engine.step.Executor over a transformers model whose attention is ours.

    Slot operations of a step are done even if the step then fails; of its rows nothing is left.
    """

    def __init__(
        self,
        model: Any,
        limits: Limits,
        tables: PageTables,
        cache: KVCache,
        depth: int,
    ) -> None:
        self.limits = limits
        self.depth = depth
        self.replay: Replay | None = None
        self._model: Any = model
        self._tables = tables
        self._cache = cache
        self._device: torch.device = cache.keys[0].device
        self._vocab_size: int = model.config.get_text_config().vocab_size
        affordable = OUTPUT_BYTES[self._device.type] // (4 * self._vocab_size)
        self.outputs = max(limits.running, 2, min(limits.step_tokens, affordable))
        self._last = torch.zeros(limits.slots, dtype=torch.int64, device=self._device)
        self._drawers: dict[int, Drawer] = {}

    @torch.inference_mode()
    def submit(self, batch: Batch) -> object:
        for op in batch.ops:
            self._tables.apply(op)
        for row in batch.rows:
            assert self._tables.held[row.slot] == row.start, "a row starts where its slot ends"
        step = Step(batch.rows)
        try:
            for spans in passes(batch.rows, self.outputs):
                step.results.append(self._pass(spans))
        except (MemoryError, RuntimeError) as error:
            self._undo(batch.rows)
            if not _is_out_of_memory(error):
                raise
            raise StepFailed("out of memory") from None
        return step

    @torch.inference_mode()
    def collect(self, ticket: object) -> Sequence[RowResult]:
        assert isinstance(ticket, Step)
        try:
            return read_results(ticket.rows, ticket.results)
        except StepFailed:
            for row in ticket.rows:
                self._cache.scrub(self._tables.sole(row.slot))
            self._undo(ticket.rows)
            raise

    def forget(self, key: int) -> None:
        self._drawers.pop(key, None)

    def close(self) -> None:
        self._cache.close()
        self._model = self.replay = None
        self._last = torch.empty(0)

    # -- one pass ---------------------------------------------------------------------------------

    def _undo(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            self._tables.shrink(row.slot, min(row.start, self._tables.held[row.slot]))

    def _pass(self, spans: list[Span]) -> PassResult:
        for span in spans:
            if copied := self._tables.grow(span.row.slot, span.start + span.size):
                self._cache.copy_page(*copied)
        inputs = gather_inputs(spans, self._tables, self._last)
        return self._choose(spans, inputs, self._logits(inputs))

    def _logits(self, inputs: Inputs) -> Tensor:
        """float32 [outputs, vocabulary]."""
        found = None if self.replay is None else self.replay.run(inputs)
        return found if found is not None else forward(self._model, inputs, Paged(self._cache, inputs.layout))

    def _choose(self, spans: list[Span], inputs: Inputs, logits: Tensor) -> PassResult:
        best = logits.max(-1)
        result = PassResult(spans, best.values.isfinite())
        if any(span.scored for span in spans):
            self._score_prompts(result, logits)
        drawing = [span for span in spans if span.samples]
        if drawing:
            sampled, first = _sampling_rows(spans, logits, best.indices)
            choices = [self._choice(span) for span in drawing]
            result.tokens = choose(sampled, first, choices, self._last)
            self._last.index_copy_(0, inputs.slots, result.tokens)
            self._score_choices(result, sampled, choices)
        return result.fetched()

    def _choice(self, span: Span) -> Choice:
        row, sequence = span.row, span.row.sequence
        end, mask = row.start + len(row.tokens), None if row.mask is None else row.mask()
        return Choice(self._drawer(sequence), sequence.tokens, end, row.draw, row.slot, mask)

    def _drawer(self, sequence: SequenceView) -> Drawer:
        if (drawer := self._drawers.get(sequence.key)) is None:
            drawer = self._drawers[sequence.key] = Drawer(sequence, self._vocab_size)
        return drawer

    # -- log-probabilities ------------------------------------------------------------------------

    def _score_choices(self, result: PassResult, logits: Tensor, choices: Sequence[Choice]) -> None:
        wanted = [(row, c.params.logprobs) for row, c in enumerate(choices) if c.params.logprobs is not None]
        if not wanted:
            return
        assert result.tokens is not None
        index = numbers_to_device([row for row, _ in wanted], self._device)
        result.wanted = wanted
        result.scores = score(logits[index], result.tokens[index], max(count for _, count in wanted))

    def _score_prompts(self, result: PassResult, logits: Tensor) -> None:
        rows: list[int] = []
        following: list[int] = []
        counts: list[int] = []
        for place, span in _places(result.spans):
            rows += range(place, place + span.scored)
            first = span.start + 1
            following += span.row.sequence.tokens[first : first + span.scored]
            counts += [span.row.sequence.params.prompt_logprobs or 0] * span.scored
        index, tokens = to_device(torch.tensor([rows, following], dtype=torch.int64), self._device)
        result.prompt_counts = counts
        result.prompt_scores = score(logits[index], tokens, max(counts))
        result.candidates = [self._candidates(span, place, logits) for place, span in _places(result.spans)]

    def _candidates(self, span: Span, place: int, logits: Tensor) -> Tensor | None:
        """float32 [positions, n + 1] for the last scored positions of the span that have candidates."""
        wanted = span.row.sequence.params.prompt_candidates
        if wanted is None or not span.scored:
            return None
        begin, end = max(wanted.first, span.start + 1), span.start + 1 + span.scored
        if begin >= end:
            return None
        ids = b"".join(map(wanted.at, range(begin, end)))
        table = torch.frombuffer(bytearray(ids), dtype=torch.int32).view(end - begin, wanted.count).long()
        rows = logits[place + span.scored - (end - begin) : place + span.scored]
        return candidate_logs(rows, to_device(table, self._device))


def forward(model: Any, inputs: Inputs, paged: Paged) -> Tensor:
    """Logits of the tokens in `keep`: float32 [outputs, vocabulary]."""
    answer = model(
        input_ids=inputs.tokens[None],
        position_ids=inputs.positions[None],
        use_cache=False,
        logits_to_keep=inputs.keep,
        paged=paged,
    )
    logits: Tensor = answer.logits[0]
    return logits.float()


def _places(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the row of logits at which its own begin."""
    place = 0
    for span in spans:
        yield place, span
        place += span.outputs


def _sampling_rows(spans: Sequence[Span], logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    if all(span.outputs == span.samples for span in spans):
        return logits, best
    sampling = [place + span.scored for place, span in _places(spans) if span.samples]
    index = numbers_to_device(sampling, logits.device)
    return logits[index], best[index]


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
