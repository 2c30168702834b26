"""The engine's only loop: take commands, plan a step, compute it, send its events in one frame."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from server.engine.compiler import Compiler
from server.engine.constrain import Constraint
from server.engine.scheduler import Scheduler
from server.engine.step import Batch, Executor, StepFailed
from server.engine.waits import Waits
from server.errors import EngineFailed, ServerError
from server.types import (
    Abort,
    Command,
    Embed,
    Embedded,
    Event,
    Events,
    Failed,
    Generate,
    Hold,
    Open,
    Reply,
    Shutdown,
    Status,
    Tokenize,
    Tokenized,
    Tokens,
)

STATUS_EVERY_S = 0.05
EMBED_TOKENS = 64  # of texts between two steps; a text that is longer is done whole
COMPILING_WAIT_S = 0.01  # between two looks at the commands while nothing but grammars is at work


class Inbox(Protocol):
    def drain(self, *, block: bool) -> list[Command]:
        """All commands that arrived; waits for the first if `block`."""
        ...


class Tokenizer(Protocol):
    def __call__(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...


class Embedder(Protocol):
    """What the loop needs of server.backends.base.Embedder, which lies on a higher floor."""

    def embed(self, tokens: Sequence[int]) -> bytes: ...
    def close(self) -> None: ...


class EngineLoop:
    """Runs until it is told to shut down; a failed step fails one sequence, never the loop."""

    def __init__(
        self,
        executor: Executor,
        inbox: Inbox,
        send: Callable[[Reply], None],
        tokenize: Tokenizer | None = None,
        embedder: Embedder | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.executor = executor
        self.inbox = inbox
        self.send = send
        self.tokenize = tokenize
        self.embedder = embedder
        self.compiler = compiler
        self._embeds: dict[str, Embed] = {}  # in order of arrival
        self._embed_due = 0.0
        self.scheduler = Scheduler(executor.limits)
        self._flying: deque[tuple[Batch, object]] = deque()
        self._outbox: list[Event] = []
        self._waits = Waits(time.monotonic)
        self._stopping = False
        self._reported = Status()
        self._report_due = 0.0

    def run(self) -> None:
        try:
            while not self._stopping:
                for command in self.inbox.drain(block=not self._busy):
                    self._obey(command)
                self._take_compiled()
                self._step()
                self._embed_some()
                self._flush()
        finally:
            if self.embedder is not None:
                self.embedder.close()
            if self.compiler is not None:
                self.compiler.close()
            self.executor.close()

    @property
    def _busy(self) -> bool:
        return bool(self.scheduler.busy or self._flying or self._embeds or self._compiling)

    @property
    def _compiling(self) -> bool:
        return self.compiler is not None and self.compiler.busy

    # -- commands ---------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Generate():
                self._accept(command)
            case Abort(id=request_id):
                self._abort(request_id)
            case Hold(id=request_id, on=on):
                self.scheduler.hold(request_id, on)
            case Tokenize():
                self._tokenize(command)
            case Embed():
                self._embeds[command.id] = command
            case Shutdown():
                self._stopping = True
            case Open():
                raise AssertionError("an engine is opened once, before its loop")

    def _abort(self, request_id: str) -> None:
        if self._embeds.pop(request_id, None) is not None:
            return
        if self.compiler is not None and self.compiler.cancel(request_id):
            self._emit([Tokens(id=request_id, tokens=(), finish="abort")])
        elif (event := self.scheduler.abort(request_id)) is not None:
            self._emit([event])

    def _accept(self, request: Generate) -> None:
        self._waits.arrived(request.id)
        if request.grammar is None and request.reasoning is None:
            self._add(request, None)
        elif self.compiler is None:
            self._refuse(request, ServerError("this engine follows no grammars"))
        else:
            self.compiler.start(request)

    def _take_compiled(self) -> None:
        """Requests whose grammars are compiled. Where there is nothing else to do, wait for one."""
        if self.compiler is None or not self.compiler.busy:
            return
        if not (self.scheduler.busy or self._flying or self._embeds):
            self.compiler.wait(COMPILING_WAIT_S)
        for request, outcome in self.compiler.finished():
            if isinstance(outcome, ServerError):
                self._refuse(request, outcome)
            else:
                self._add(request, outcome)

    def _add(self, request: Generate, constraint: Constraint | None) -> None:
        try:
            self.scheduler.add(request, constraint)
        except ServerError as error:
            self._refuse(request, error)

    def _refuse(self, request: Generate, error: ServerError) -> None:
        self._emit([Failed(id=request.id, code=error.code, message=str(error), param=error.param)])

    def _tokenize(self, command: Tokenize) -> None:
        try:
            if self.tokenize is None:
                raise ServerError("this engine has no tokenizer")
            tokens = self.tokenize(
                command.text, add_special=command.add_special, parse_special=command.parse_special
            )
        except ServerError as error:
            self._emit([Failed(id=command.id, code=error.code, message=str(error))])
            return
        self._emit([Tokenized(id=command.id, tokens=tuple(tokens))])

    def _embed_some(self) -> None:
        """A few tokens of texts a turn: a long list of them delays each running stream by no more than that,
        and short texts do not wait for a step each. Then it is the turn of answers, for the same time."""
        started = time.monotonic()
        if not self._embeds or (self.scheduler.busy and started < self._embed_due):
            return
        room = EMBED_TOKENS
        while self._embeds and room > 0:
            command = self._embeds.pop(next(iter(self._embeds)))
            room -= len(command.tokens)
            self._embed(command)
        ended = time.monotonic()
        self._embed_due = ended + (ended - started)

    def _embed(self, command: Embed) -> None:
        try:
            if self.embedder is None:
                raise ServerError("this engine makes no embeddings")
            vector = self.embedder.embed(command.tokens)
        except ServerError as error:
            self._emit([Failed(id=command.id, code=error.code, message=str(error))])
        except StepFailed as failure:
            self._emit([Failed(id=command.id, code=EngineFailed.code, message=str(failure))])
        else:
            self._emit([Embedded(id=command.id, vector=vector)])

    # -- steps ------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Keep `depth` steps in flight, then wait for the oldest."""
        while len(self._flying) < self.executor.depth:
            batch = self.scheduler.plan()
            self._waits.begun(self.scheduler.take_begun())
            if not batch.rows and not batch.ops:
                break
            try:
                self._flying.append((batch, self.executor.submit(batch)))
            except StepFailed as failure:
                self._fail(batch, failure)
                return
        if self._flying:
            self._collect()

    def _collect(self) -> None:
        batch, ticket = self._flying.popleft()
        try:
            results = list(self.executor.collect(ticket))
        except StepFailed as failure:
            self._fail(batch, failure)
            return
        self._emit(self.scheduler.commit(batch, results))

    def _fail(self, batch: Batch, failure: StepFailed) -> None:
        """Steps submitted after the failed one were planned on its results: theirs are worth nothing."""
        batches = [batch]
        while self._flying:
            later, ticket = self._flying.popleft()
            batches.append(later)
            try:
                self.executor.collect(ticket)
            except StepFailed:
                continue  # it fails with the others below
        self._emit(self.scheduler.fail(batches, str(failure)))

    # -- replies ----------------------------------------------------------------------------------

    def _emit(self, events: list[Event]) -> None:
        self._outbox += map(self._waits.told, events)

    def _flush(self) -> None:
        if self._outbox:
            self.send(Events(items=tuple(self._outbox)))
            self._outbox.clear()
        for key in self.scheduler.take_ended():
            self.executor.forget(key)
        self._report()

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._report_due and self.scheduler.busy:
            return
        if (status := self.scheduler.status) != self._reported:
            self.send(status)
            self._reported, self._report_due = status, now + STATUS_EVERY_S
