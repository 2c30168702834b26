"""The web process's view of one engine process: requests in, events out, and the news of its death.

One task reads replies, another waits for the process. Whatever comes first, the end of the stream, a reply
that cannot be read or the end of the process, is the engine's death, told once to everybody who waits.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial

from server.errors import EngineDied, EngineFailed, OpenError, RequestError, ServerError, by_code
from server.process.child import describe_exit, engine_environment, python_module
from server.process.inbox import Inbox
from server.process.wire import BrokenWire, FrameTooLong, frame, read_reply
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
    Loading,
    Open,
    OpenFailed,
    Ready,
    Reply,
    Shutdown,
    Status,
    Tokenize,
    Tokenized,
    Tokens,
)

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.5  # between the end of the stream and the end of the process, either way round
SHUTDOWN_S = 5.0  # for an engine that was asked to stop
TERMINATE_S = 2.0  # for an engine that was told to


class EngineClient:
    """Made by `start`. `on_death` is called once, in the event loop, when the engine ends unasked."""

    on_death: Callable[["EngineClient"], None] | None = None

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        on_progress: Callable[[float], None] | None,
    ) -> None:
        self._process = process
        self._reader, self._writer = streams
        self._on_progress = on_progress
        self._inboxes: dict[str, Inbox] = {}
        self._broken: str | None = None
        self._given_up = False
        self._numbers = itertools.count()
        self._opened: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stopping: asyncio.Task[None] | None = None
        self._life = asyncio.create_task(self._live(), name=f"engine {process.pid}")
        self.status = Status()
        self.death: str | None = None  # how the engine ended
        self._answered = False  # any request, if only by a token

    @classmethod
    async def start(cls, spec: Open, *, on_progress: Callable[[float], None] | None = None) -> "EngineClient":
        """Start an engine and wait until it is ready; cancelling ends it.

        Raises OpenError where the backend refuses the variant, EngineDied where the process ends before that.
        """
        spawning = asyncio.create_task(cls._spawn(spec, on_progress))
        try:
            client = await asyncio.shield(spawning)
            client._send(spec)
            await asyncio.shield(client._opened)
        except BaseException:
            await asyncio.shield(cls._undo(spawning))
            raise
        return client

    @staticmethod
    async def _undo(spawning: "asyncio.Task[EngineClient]") -> None:
        """Cancelled between fork and connection, a start would leave a process that nobody knows."""
        with contextlib.suppress(OpenError):
            client = await spawning
            client._kill()
            await client.stop()

    @classmethod
    async def _spawn(cls, spec: Open, on_progress: Callable[[float], None] | None) -> "EngineClient":
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *python_module("server.process.worker", str(theirs.fileno()), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what a library prints is a message, not data
                env=engine_environment(os.environ, spec.threads),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the web process, which drains
            )
        except OSError as error:
            ours.close()
            raise OpenError(f"no engine process could be started ({error.strerror})") from None
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, await asyncio.open_unix_connection(sock=ours), on_progress)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def dead(self) -> bool:
        return self.death is not None

    @property
    def _exit(self) -> str:
        return describe_exit(self._process.returncode)

    @property
    def killed_at_work(self) -> bool:
        """It ended by a SIGKILL, which no process gives itself, after it had answered somebody."""
        return self._answered and self._broken is None and self._process.returncode == -signal.SIGKILL

    @property
    def ready(self) -> Ready:
        """What the engine said when it had opened its variant."""
        return self._opened.result()

    @property
    def requests(self) -> int:
        """How many requests wait for events."""
        return len(self._inboxes)

    async def generate(self, request: Generate) -> AsyncGenerator[Tokens]:
        """Events of one request up to its last. Raises ServerErrors; closing it aborts the request."""
        finished = False
        with self._inbox(request) as inbox:
            try:
                while not finished:
                    event = await inbox.get()
                    finished = not isinstance(event, Tokens) or event.finish is not None
                    if not isinstance(event, Tokens):
                        raise _trouble(event)
                    yield event
            finally:
                if not finished and not self.dead:
                    self._send(Abort(id=request.id))

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of `text` by the model's own tokenizer, for variants without a tokenizer.json."""
        id = f"tokenize-{next(self._numbers)}"
        command = Tokenize(id=id, text=text, add_special=add_special, parse_special=parse_special)
        with self._inbox(command) as inbox:
            event = await inbox.get()
            if not isinstance(event, Tokenized):
                raise _trouble(event)
            return list(event.tokens)

    async def embed(self, tokens: Sequence[int]) -> bytes:
        """The embedding of a text's tokens: float32, little-endian. Cancelling takes it from the queue."""
        command = Embed(id=f"embed-{next(self._numbers)}", tokens=tuple(tokens))
        with self._inbox(command) as inbox:
            try:
                event = await inbox.get()
            except asyncio.CancelledError:
                if not self.dead:
                    self._send(Abort(id=command.id))
                raise
            if not isinstance(event, Embedded):
                raise _trouble(event)
            return event.vector

    async def stop(self) -> None:
        """Ask, then tell, then kill; returns when the process is gone and reaped. May be called again."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name=f"stop engine {self.pid}")
        await asyncio.shield(self._stopping)

    @contextlib.contextmanager
    def _inbox(self, command: Generate | Tokenize | Embed) -> Iterator[Inbox]:
        """Send a request and collect its events. Raises EngineDied where nobody is there to take it."""
        if self.dead or self._stopping is not None:
            raise EngineDied("the engine is not running")
        assert command.id not in self._inboxes, "a request id was used twice"
        try:
            self._send(command)
        except FrameTooLong:
            raise RequestError("the request is too large for one message to the engine") from None
        inbox = self._inboxes[command.id] = Inbox(partial(self._hold, command.id))
        try:
            yield inbox
        finally:
            del self._inboxes[command.id]

    def _send(self, command: Command) -> None:
        """Never waits: the engine reads in a thread of its own, and the API bounds what can be asked.

        Between an engine's end and `_bury` nobody takes it, and writing would be an error of ours.
        """
        if not self._writer.is_closing():
            self._writer.write(frame(command))

    def _hold(self, id: str, on: bool) -> None:
        if not self.dead:
            self._send(Hold(id=id, on=on))

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _stop(self) -> None:
        if not self.dead:
            self._send(Shutdown())
        for patience_s, harder in ((SHUTDOWN_S, self._process.terminate), (TERMINATE_S, self._process.kill)):
            if (await asyncio.wait({self._life}, timeout=patience_s))[0]:
                return
            with contextlib.suppress(ProcessLookupError):
                harder()
        await asyncio.wait({self._life})

    async def _live(self) -> None:
        """Until the process is gone and reaped and everybody knows."""
        exited = asyncio.create_task(self._process.wait())
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait({exited, listening}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({exited, listening}, timeout=LAST_WORDS_S)
        except asyncio.CancelledError:  # the event loop ends, and every engine with it
            self._given_up = True
            raise
        finally:
            self._bury("is stopped" if self._given_up else self._broken or self._exit)
            self._kill()
            listening.cancel()
            self._writer.close()
        await exited

    async def _listen(self) -> None:
        try:
            while (reply := await read_reply(self._reader)) is not None:
                self._take(reply)
        except BrokenWire as error:
            log.error("engine %d: %s", self.pid, error)
            self._broken = "sent what is not a message"
            self._kill()

    def _take(self, reply: Reply) -> None:
        match reply:
            case Events(items=items):
                self._answered = True
                for event in items:
                    if (inbox := self._inboxes.get(event.id)) is not None:
                        inbox.put(event)
            case Status():
                self.status = reply
            case Loading(done=done):
                if self._on_progress is not None:
                    self._on_progress(done)
            case Ready():
                self._open(reply)
            case OpenFailed(message=message):
                self._open(OpenError(message))

    def _open(self, outcome: Ready | ServerError) -> None:
        if self._opened.done():
            return
        if isinstance(outcome, Ready):
            self._opened.set_result(outcome)
        else:
            self._opened.set_exception(outcome)
            self._opened.exception()  # seen: nobody waits where the start was cancelled

    def _bury(self, death: str) -> None:
        self.death = death
        planned = self._stopping is not None or self._given_up
        (log.info if planned else log.warning)("engine %d %s", self.pid, death)
        self._open(EngineDied(f"the engine {death} while it was loading"))
        for inbox in self._inboxes.values():
            inbox.put(EngineDied(f"the engine {death} while it held this request"))
        if self.on_death is not None and not planned:
            self.on_death(self)


def _trouble(event: Event | EngineDied) -> ServerError:
    match event:
        case Failed(code=code, message=message, param=param):
            return by_code(code, message, param)
        case EngineDied():
            return event
        case _:
            return EngineFailed("the engine answered with an event of another kind")
