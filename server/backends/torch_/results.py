"""What a pass computed, on its way from the device to the scheduler."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from msgspec.structs import replace as replace_struct
from torch import Tensor

from server.backends.torch_.passes import Span
from server.backends.torch_.sampling import Scores
from server.engine.step import Row, RowResult, StepFailed
from server.types import TokenLogprobs


@dataclass(slots=True)
class PassResult:
    spans: list[Span]
    sound: Tensor  # bool [outputs]: the logits are a distribution
    tokens: Tensor | None = None  # int64, one for each span that samples
    wanted: list[tuple[int, int]] = field(default_factory=list)  # (place in `tokens`, likely tokens to list)
    scores: Scores | None = None  # one row for each of `wanted`
    prompt_counts: list[int] = field(default_factory=list)  # likely tokens to list
    prompt_scores: Scores | None = None  # one row for each of `prompt_counts`
    candidates: list[Tensor | None] = field(default_factory=list)  # of each span; see candidate_logs
    _arrived: torch.cuda.Event | None = None

    def fetched(self) -> "PassResult":
        """The same on its way to the host, without waiting for the device."""
        if not self.sound.is_cuda:
            return self
        found = replace(
            self,
            sound=_to_host(self.sound),
            tokens=None if self.tokens is None else _to_host(self.tokens),
            scores=_scores_to_host(self.scores),
            prompt_scores=_scores_to_host(self.prompt_scores),
            candidates=[None if found is None else _to_host(found) for found in self.candidates],
        )
        found._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        found._arrived.record()
        return found

    def wait(self) -> None:
        """Raises StepFailed where the model computed no numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not bool(self.sound.all()):
            raise StepFailed("the model's logits are not finite numbers")


def _to_host(tensor: Tensor) -> Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor, non_blocking=True)


def _scores_to_host(scores: Scores | None) -> Scores | None:
    if scores is None:
        return None
    return Scores(_to_host(scores.own), _to_host(scores.ranks), _to_host(scores.ids), _to_host(scores.likely))


def read_results(rows: Sequence[Row], results: Sequence[PassResult]) -> list[RowResult]:
    """One result a row. Raises StepFailed."""
    for result in results:
        result.wait()
    tokens: list[int | None] = [None] * len(rows)
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    prompts: dict[int, list[TokenLogprobs]] = {}
    for result in results:
        _read(result, tokens, logprobs)
        for number, found in _prompt_scores(result):
            prompts.setdefault(number, []).extend(found)
    return [
        RowResult(token, logprob, tuple(prompts.get(number, ())))
        for number, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True))
    ]


def _read(result: PassResult, tokens: list[int | None], logprobs: list[TokenLogprobs | None]) -> None:
    if result.tokens is None:
        return
    numbers = [span.number for span in result.spans if span.samples]
    for number, token in zip(numbers, result.tokens.tolist(), strict=True):
        tokens[number] = token
    if result.scores is not None:
        scores = result.scores.read([count for _, count in result.wanted])
        for (place, _), found in zip(result.wanted, scores, strict=True):
            logprobs[numbers[place]] = found


def _prompt_scores(result: PassResult) -> Iterator[tuple[int, list[TokenLogprobs]]]:
    """(row number, the scores of a span of it)."""
    if result.prompt_scores is None:
        return
    scores, place = result.prompt_scores.read(result.prompt_counts), 0
    for span, logs in zip(result.spans, result.candidates, strict=True):
        own = scores[place : place + span.scored]
        yield span.number, own if logs is None else _with_candidates(own, logs)
        place += span.scored


def _with_candidates(scores: list[TokenLogprobs], logs: Tensor) -> list[TokenLogprobs]:
    """`logs` are those of the last ones."""
    plain = len(scores) - len(logs)
    lines = logs.numpy().astype("<f4")
    with_logs = zip(scores[plain:], lines, strict=True)
    return scores[:plain] + [replace_struct(own, candidates=line.tobytes()) for own, line in with_logs]
