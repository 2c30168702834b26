"""The outermost layer, as plain ASGI: request ids, size limits, and a last net for unexpected exceptions."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.envelope import refused_with
from server.api.errors import response_of, unexpected
from server.api.hosts import Hosts
from server.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    RequestError,
    RequestTimeout,
    ServerError,
    WrongHost,
)
from server.logs import request_id

HEADER_LIMIT = 64 * 1024  # bytes of all headers together
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TRACE = "quantserve.trace"

log = logging.getLogger(__name__)

Ended = Callable[[str, int, str | None], None]  # route, status, code of the error


def ignore(route: str, status: int, code: str | None) -> None:
    """For applications that count nothing."""


class Trace:
    """What every answer to one request carries in its headers, errors included."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.headers: dict[str, str] = {"x-request-id": id}
        self.ignored: list[str] = []  # parameters without effect
        self.late: dict[str, Callable[[], str | None]] = {}  # known when the answer begins; None: no header


def trace_of(scope: Scope) -> Trace:
    trace = scope[TRACE]
    assert isinstance(trace, Trace)
    return trace


class Edge:
    def __init__(
        self, app: ASGIApp, hosts: Hosts, body_limit: int, body_wait_s: float, ended: Ended = ignore
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.body_limit = body_limit
        self.body_wait_s = body_wait_s
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        trace = scope[TRACE] = Trace(given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
        outgoing = _Outgoing(send, trace)
        request_id.set(trace.id)
        refused_with.set(None)
        started = time.monotonic()
        try:
            await self._answer(scope, receive, outgoing, headers)
        finally:
            self._tell(scope, outgoing.status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, outgoing: "_Outgoing", headers: Headers) -> None:
        try:
            _check_size(headers, self.body_limit)
            if not self.hosts.allow(headers.getlist("host")):
                raise WrongHost("the Host header names none of this server's hosts")
            await self.app(scope, _Incoming(receive, self.body_limit, self.body_wait_s), outgoing)
        except ServerError as error:
            await response_of(error, scope["path"])(scope, receive, outgoing)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets the one shape
            told = unexpected(error)
            if outgoing.started:
                raise RuntimeError("an answer broke off") from None
            await response_of(told, scope["path"])(scope, receive, outgoing)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Names the route as it is written in the code: what a client put into a path is logged nowhere."""
        route = getattr(scope.get("route"), "path", "unknown")
        self.ended(route, status, refused_with.get())
        facts = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
        log.debug("%(method)s %(route)s %(status)d in %(seconds).3f s", facts, extra={"facts": facts})


class _Incoming:
    """Raises BodyTooLarge as soon as a body without a truthful Content-Length exceeds the limit, and
    RequestTimeout for one that is not complete in time."""

    def __init__(self, receive: Receive, limit: int, wait_s: float) -> None:
        self.receive = receive
        self.limit = self.left = limit
        self.wait_s = wait_s
        self.until = asyncio.get_running_loop().time() + wait_s
        self.complete = False

    async def __call__(self) -> Message:
        message = await (self.receive() if self.complete else self._in_time())
        if message["type"] == "http.request":
            self.complete = not message.get("more_body", False)
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                raise _too_large(self.limit)
        return message

    async def _in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self.until):
                return await self.receive()
        except TimeoutError:
            raise RequestTimeout(f"the body was not complete after {self.wait_s:g} s") from None


class _Outgoing:
    def __init__(self, send: Send, trace: Trace) -> None:
        self.send = send
        self.trace = trace
        self.started = False
        self.status = 0  # of the answer; 0: none was sent

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            found = {**self.trace.headers, **{name: ask() for name, ask in self.trace.late.items()}}
            extra = [(name.encode(), value.encode("latin-1")) for name, value in found.items() if value]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self.send(message)


def _check_size(headers: Headers, body_limit: int) -> None:
    if sum(len(name) + len(value) + 4 for name, value in headers.raw) > HEADER_LIMIT:
        raise HeadersTooLarge(f"the headers exceed {HEADER_LIMIT} bytes")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise RequestError("Content-Length is not a number")
    if len(length) > 18 or int(length) > body_limit:
        raise _too_large(body_limit)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body exceeds {limit} bytes")
