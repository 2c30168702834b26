"""Server-sent events: a frame a chunk, comments while there is nothing to say, an error as the last."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.envelope import body_of
from server.api.errors import ClientGone, unexpected
from server.api.leaving import cancelled, unless_gone, until_gone
from server.errors import ServerError

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
# Some clients split lines where Unicode does, not where SSE does: at these, when they stand in a JSON string.
UNICODE_BREAKS = tuple((c.encode(), f"\\u{ord(c):04x}".encode()) for c in ("\x85", "\u2028", "\u2029"))


class Voice(Protocol):
    """What a stream says besides its frames."""

    @property
    def ping(self) -> bytes: ...  # while there is nothing to say
    @property
    def end(self) -> bytes: ...
    def error(self, error: ServerError) -> bytes: ...


@dataclass(frozen=True)
class Plain:
    """Comments, errors in OpenAI's shape, and an end that tells a whole stream from one that broke off."""

    ping: bytes = PING
    end: bytes = DONE

    def error(self, error: ServerError) -> bytes:
        return frame(body_of(error))


PLAIN = Plain()


def frame(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def event(name: str, body: bytes) -> bytes:
    """A frame with a name, for readers that tell events apart by it."""
    return b"event: " + name.encode() + b"\n" + frame(safe_lines(body))


def safe_lines(body: bytes) -> bytes:
    """The same JSON, without characters that any client takes for the end of a line."""
    if not body.isascii():
        for raw, escaped in UNICODE_BREAKS:
            body = body.replace(raw, escaped)
    return body


async def open_stream(
    receive: Receive, frames: AsyncGenerator[bytes], ping_s: float, voice: Voice = PLAIN
) -> Response:
    """Errors before the first frame are raised, so that they keep their status, unless that frame is so late
    that the response must start with pings. Raises ClientGone."""
    first = asyncio.ensure_future(_next(frames))
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((first, gone), timeout=ping_s, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not first.done():
            raise ClientGone
        if first.done():
            first.result()
    except BaseException:
        await cancelled(first)
        await frames.aclose()
        raise
    finally:
        await cancelled(gone)
    return EventStream(first, frames, ping_s, voice)


class EventStream(Response):
    """Owns the stream: when the response ends, however it ends, the stream is closed."""

    def __init__(
        self,
        first: "asyncio.Task[bytes | None]",
        frames: AsyncGenerator[bytes],
        ping_s: float,
        voice: Voice,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._frames = frames
        self._ping_s = ping_s
        self._voice = voice
        self._quiet = not first.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            pass  # the answer has begun, and nobody is left to be told how it ends
        finally:
            await cancelled(self._first)
            await self._frames.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pings = asyncio.ensure_future(self._ping(send))
        try:
            await self._send_frames(send)
        except ServerError as error:
            await _send(send, self._voice.error(error))
        except Exception as error:  # noqa: BLE001 - too late for a status: it becomes the last event
            await _send(send, self._voice.error(unexpected(error)))
        finally:
            await cancelled(pings)
        await send({"type": "http.response.body", "body": self._voice.end, "more_body": False})

    async def _send_frames(self, send: Send) -> None:
        if (first := await self._first) is None:
            return
        await _send(send, first)
        async for data in self._frames:
            self._quiet = False
            await _send(send, data)

    async def _ping(self, send: Send) -> None:
        """A comment after each interval that had no frame."""
        while True:
            if self._quiet:
                await _send(send, self._voice.ping)
            self._quiet = True
            await asyncio.sleep(self._ping_s)


async def _next(frames: AsyncGenerator[bytes]) -> bytes | None:
    return await anext(frames, None)


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
