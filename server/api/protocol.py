"""uvicorn's HTTP/1.1 protocol with bounds on the head of a request, in bytes and in time, and on clients that
do not read."""

import asyncio
import logging
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.edge import HEADER_LIMIT
from server.api.envelope import body_of
from server.errors import HeadersTooLarge, RequestError

HEAD_S = 30.0  # for a head to be complete
BODY_SLACK_S = 5.0  # after the time that a body has, in which the application says so itself
UNSENT = 16 * 1024  # bytes that the kernel holds of an answer, and as many here, before its stream waits
REFUSAL = (
    b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
)


log = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """The parser below keeps an unfinished head for ever and at any size, and waits for a body or a reader as
    long; this closes the connection.

    The kernel would take megabytes of a stream that nobody reads, and its tokens would be computed all along:
    few bytes may wait there, so that a stream stands still soon after its reader does.
    """

    body_wait_s = 30.0
    write_wait_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._advanced = False  # past a head or body, with the data at hand
        self._slow: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes when the reader was last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._drop()

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
        self._slow = self.loop.call_later(seconds, self._drop)

    def _stop_clock(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _watch_reader(self) -> None:
        self._stop_watching()
        self._unread = self.transport.get_write_buffer_size()
        self._stuck = self.loop.call_later(self.write_wait_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """While writing is paused nothing is added: fewer bytes are a client that reads, if slowly."""
        if self.transport.get_write_buffer_size() < self._unread:
            self._watch_reader()
            return
        log.info("a connection is closed: its client has read nothing for %g s", self.write_wait_s)
        self.transport.abort()

    def _stop_watching(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _drop(self) -> None:
        """A transport that is closed waits for its reader."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.close()


def bounded(body_wait_s: float, write_wait_s: float) -> type[BoundedProtocol]:
    """The protocol for a server whose requests have so long for their bodies, and answers for a reader."""
    bounds = {"body_wait_s": body_wait_s, "write_wait_s": write_wait_s}
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
