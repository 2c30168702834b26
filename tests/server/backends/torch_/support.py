"""The scheduler and an executor without an engine around them, and transformers' forward to compare with."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from server.backends.torch_.backend import TorchBackend
from server.backends.torch_.executor import TorchExecutor
from server.engine.scheduler import Scheduler
from server.engine.step import Batch, Executor, StepFailed
from server.types import Failed, Generate, Open, TokenLogprobs, Tokens

BACKEND = TorchBackend("torch", frozenset())


def open_model(folder: Path, **changes: Any) -> TorchExecutor:
    options = {"device": "cpu"} | changes.pop("options", {})
    spec: dict[str, Any] = {"backend": "torch", "context": 256, "parallel": 6, "threads": 1}
    opened = BACKEND.open(Open(variant=str(folder), options=options, **(spec | changes)), lambda _: None)
    assert isinstance(opened.executor, TorchExecutor)
    return opened.executor


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str = ""


def serve(executor: Executor, requests: Sequence[Generate]) -> tuple[dict[str, Answer], Scheduler]:
    """All requests at once, as an engine would run them."""
    scheduler = Scheduler(executor.limits)
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        scheduler.add(request)
    flying: deque[tuple[Batch, object]] = deque()
    while scheduler.busy or flying:
        _turn(executor, scheduler, flying, answers)
        for key in scheduler.take_ended():
            executor.forget(key)
    return answers, scheduler


def _turn(
    executor: Executor,
    scheduler: Scheduler,
    flying: deque[tuple[Batch, object]],
    answers: dict[str, Answer],
) -> None:
    batches: list[Batch] = []
    try:
        while len(flying) < executor.depth and ((batch := scheduler.plan()).rows or batch.ops):
            batches = [batch]
            flying.append((batch, executor.submit(batch)))
        batch, ticket = flying.popleft()
        batches = [batch]
        events = scheduler.commit(batch, list(executor.collect(ticket)))
    except StepFailed as failure:
        batches += [batch for batch, _ in flying]
        flying.clear()
        events = scheduler.fail(batches, str(failure))
    for event in events:
        answer = answers[event.id]
        if isinstance(event, Failed):
            answer.error = event.message
        elif isinstance(event, Tokens):
            answer.tokens += event.tokens
            answer.logprobs += event.logprobs or ()
            answer.prompt_logprobs = answer.prompt_logprobs or event.prompt_logprobs or ()


@dataclass(frozen=True)
class Reference:
    """transformers' model, whole sequences at a time."""

    model: Any

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return cls(model.eval())

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]: after each token."""
        found: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)
        return found

    def furthest(self, request: Generate, answer: Answer) -> float:
        """The largest difference of all log-probabilities that came with an answer."""
        found = self.differences(request.prompt, answer)
        if request.params.prompt_candidates and answer.prompt_logprobs:
            found += self.candidate_differences(request, answer)
        return max(found, default=0.0)

    def candidate_differences(self, request: Generate, answer: Answer) -> list[float]:
        table, wanted = self.logprobs(request.prompt), request.params.prompt_candidates
        assert wanted is not None
        found = []
        for position, score in enumerate(answer.prompt_logprobs, start=1):
            ids = np.frombuffer(wanted.at(position), "<i4").tolist()
            assert len(score.candidates) == (4 * len(ids) + 4 if ids else 0)
            logs = np.frombuffer(score.candidates, "<f4").tolist()
            row = table[position - 1]
            found += [abs(log - float(row[token])) for log, token in zip(logs, ids, strict=False)]
            if ids:
                others = row.index_fill(0, torch.tensor(ids), float("-inf")).logsumexp(0)
                found.append(abs(logs[-1] - float(others)))
        return found

    def differences(self, prompt: Sequence[int], answer: Answer) -> list[float]:
        tokens = [*prompt, *answer.tokens]
        table = self.logprobs(tokens)
        scores = [*answer.prompt_logprobs, *answer.logprobs]
        first = 0 if answer.prompt_logprobs else len(prompt) - 1
        found = []
        for place, score in enumerate(scores, start=first):
            found.append(abs(score.logprob - float(table[place, tokens[place + 1]])))
            found += [abs(value - float(table[place, token])) for token, value in score.top]
        return found
