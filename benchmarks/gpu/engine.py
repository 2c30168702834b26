"""A scheduler and an executor without processes around them: what the checks and timings drive."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.backends.torch_.backend import TorchBackend
from server.backends.torch_.executor import TorchExecutor
from server.engine.scheduler import Scheduler
from server.engine.step import Batch, Release, StepFailed
from server.types import Failed, Generate, Open, SamplingParams, TokenLogprobs, Tokens


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)  # of the second token and all later ones
    error: str = ""
    finish: str | None = None


def opened(folder: Path, context: int, parallel: int, **options: str) -> TorchExecutor:
    spec = Open(backend="torch", variant=str(folder), context=context, parallel=parallel, options=options)
    executor = TorchBackend("torch", frozenset()).open(spec, lambda _: None).executor
    assert isinstance(executor, TorchExecutor)
    return executor


def serve(
    executor: TorchExecutor,
    requests: Sequence[Generate],
    aborts: Mapping[str, int] | None = None,
) -> dict[str, Answer]:
    """All requests at once. `aborts`: requests that their client leaves after so many tokens."""
    scheduler = Scheduler(executor.limits)
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        scheduler.add(request)
    flying: deque[tuple[Batch, object]] = deque()
    while scheduler.busy or flying:
        _turn(executor, scheduler, flying, answers)
        for name, count in (aborts or {}).items():
            if len(answers[name].tokens) >= count and answers[name].finish is None:
                answers[name].finish = "left"
                scheduler.abort(name)
        for key in scheduler.take_ended():
            executor.forget(key)
    executor.collect(executor.submit(Batch(tuple(map(Release, range(executor.limits.slots))), ())))
    return answers


def _turn(
    executor: TorchExecutor,
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
            answer.prompt += event.prompt_logprobs or ()
            answer.finish = event.finish or answer.finish


def greedy(name: str, prompt: Sequence[int], count: int, logprobs: int | None = None) -> Generate:
    params = SamplingParams(max_tokens=count, temperature=0.0, logprobs=logprobs, reproducible=False)
    return Generate(id=name, prompt=tuple(prompt), params=params)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
