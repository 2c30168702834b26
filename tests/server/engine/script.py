"""Runs an engine loop over the toy backends with commands that arrive at given steps."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.backends.toy import Pages, Rows, ToyEmbedder, ToyExecutor, predict
from server.engine.compiler import Compiler
from server.engine.loop import EngineLoop
from server.types import (
    Command,
    Embedded,
    Event,
    Events,
    Failed,
    Generate,
    Limits,
    Reply,
    SamplingParams,
    Shutdown,
    Status,
    Tokenized,
    Tokens,
)

MEMORIES: dict[str, type[Rows] | type[Pages]] = {"toy-rows": Rows, "toy-pages": Pages}


class Script:
    """An inbox that hands out commands at given drains, then shuts the engine down."""

    def __init__(self, timed: Mapping[int, list[Command]]) -> None:
        self.timed, self.tick = dict(timed), 0

    def drain(self, *, block: bool) -> list[Command]:
        if block and not self.timed:
            return [Shutdown()]
        if block:
            self.tick = max(self.tick, min(self.timed))
        due = self.timed.pop(self.tick, [])
        self.tick += 1
        return due


@dataclass
class Run:
    executor: ToyExecutor
    loop: EngineLoop
    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    statuses: list[Status] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)  # ids of the requests whose events came, in order

    def text(self, request_id: str) -> list[int]:
        found = self.events[request_id]
        return [token for event in found if isinstance(event, Tokens) for token in event.tokens]

    def events_before(self, request_id: str, other_id: str) -> int:
        """How many events of the one came before the first of the other."""
        return self.trace[: self.trace.index(other_id)].count(request_id)

    def final(self, request_id: str) -> Event:
        """The last event, after checking that no other ends the request."""
        *others, last = self.events[request_id]
        assert isinstance(last, Failed | Tokenized | Embedded) or last.finish is not None
        assert all(isinstance(event, Tokens) and event.finish is None for event in others)
        return last


def run(
    backend: str,
    timed: Mapping[int, list[Command]],
    limits: Limits,
    fail_at: frozenset[int] = frozenset(),
    embedder: ToyEmbedder | None = None,
    compiler: Compiler | None = None,
) -> Run:
    executor = ToyExecutor(MEMORIES[backend](limits), fail_at=fail_at)
    result: Run

    def send(reply: Reply) -> None:
        match reply:
            case Events(items=items):
                for event in items:
                    result.events[event.id].append(event)
                    result.trace.append(event.id)
            case Status():
                result.statuses.append(reply)
            case _:
                raise AssertionError(reply)

    result = Run(executor, EngineLoop(executor, Script(timed), send, embedder=embedder, compiler=compiler))
    result.loop.run()
    return result


def alone(request: Generate, context: int) -> list[int]:
    """What the request must give: its tokens computed one at a time, with nothing else around."""
    held = list(request.prompt)
    params: SamplingParams = request.params
    while len(held) < min(context, len(request.prompt) + params.max_tokens):
        held.append(predict(held, params, len(held) - len(request.prompt)))
        if held[-1] in params.stop_ids:
            break
    return held[len(request.prompt) :]
