"""uvicorn's HTTP/1.1 protocol with bounds on the head of a request, in bytes and in time."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.edge import HEADER_LIMIT
from server.api.envelope import body_of
from server.errors import HeadersTooLarge, RequestError

HEAD_S = 30.0  # for a head to be complete
BODY_SLACK_S = 5.0  # after the time that a body has, in which the application says so itself
REFUSAL = (
    b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
)


class BoundedProtocol(HttpToolsProtocol):
    """The parser below keeps an unfinished head for ever and at any size, and waits for a body for ever; this
    closes the connection."""

    body_wait_s = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._advanced = False  # past a head or body, with the data at hand
        self._slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        super().data_received(data)
        if self._advanced or not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEADER_LIMIT:
            self._refuse(
                b"431 Request Header Fields Too Large",
                HeadersTooLarge(f"the headers exceed {HEADER_LIMIT} bytes"),
            )

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request", RequestError("this is no valid HTTP request"))

    def _refuse(self, status: bytes, error: RequestError) -> None:
        body = body_of(error)
        self.transport.write(REFUSAL % (status, len(body), body))
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_clock()

    def on_headers_complete(self) -> None:
        self._start_clock(self.body_wait_s + BODY_SLACK_S)
        self._head_bytes, self._in_head, self._advanced = 0, False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_clock()
        self._in_head = self._advanced = True
        super().on_message_complete()

    def _start_clock(self, seconds: float = HEAD_S) -> None:
        self._stop_clock()
        self._slow = self.loop.call_later(seconds, self.transport.close)

    def _stop_clock(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


def bounded(body_wait_s: float) -> type[BoundedProtocol]:
    """The protocol for a server whose requests have so long for their bodies."""
    return type("BoundedProtocol", (BoundedProtocol,), {"body_wait_s": body_wait_s})
