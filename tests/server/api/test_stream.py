"""Streams that start late, fail late, or lose their client."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from typing import Any

import pytest

from server.api.errors import ClientGone
from server.api.leaving import unless_gone
from server.api.sse import DONE, PING, frame, open_stream, safe_lines
from server.errors import EngineDied, RequestError

Message = MutableMapping[str, Any]


class Client:
    """An ASGI peer that keeps what it is sent, and leaves when told to."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Frames with pauses and a failure, that knows whether it was closed."""

    def __init__(self, *steps: float | bytes | Exception) -> None:
        self.steps = steps
        self.closed = False

    async def frames(self) -> AsyncGenerator[bytes]:
        try:
            for step in self.steps:
                match step:
                    case bytes():
                        yield step
                    case Exception():
                        raise step
                    case _:
                        await asyncio.sleep(step)
        finally:
            self.closed = True


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    yield Client()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, "a task was left behind"


async def answer(client: Client, source: Source, ping_s: float = 5) -> None:
    response = await open_stream(client.receive, source.frames(), ping_s)
    await response({"type": "http"}, client.receive, client.send)


async def test_frames_come_one_by_one_and_end_with_done(client: Client) -> None:
    source = Source(frame(b"1"), 0, frame(b"2"))
    await answer(client, source)
    assert client.body == b"data: 1\n\ndata: 2\n\n" + DONE
    assert len(client.sent) == 4
    assert not client.sent[-1]["more_body"]
    assert source.closed


async def test_an_error_before_the_first_frame_keeps_its_status(client: Client) -> None:
    source = Source(0.01, RequestError("wrong"))
    with pytest.raises(RequestError, match="wrong"):
        await answer(client, source)
    assert client.sent == []
    assert source.closed


async def test_a_late_first_frame_is_waited_for_with_pings(client: Client) -> None:
    await answer(client, Source(0.25, frame(b"1")), ping_s=0.05)
    assert client.body.startswith(PING + PING)
    assert client.body.endswith(b"data: 1\n\n" + DONE)
    assert 3 <= client.body.count(PING) <= 6


async def test_a_pause_within_the_stream_is_filled_with_pings(client: Client) -> None:
    await answer(client, Source(frame(b"1"), 0.3, frame(b"2")), ping_s=0.1)
    assert client.body.startswith(b"data: 1\n\n" + PING)
    assert 1 <= client.body.count(PING) <= 3


async def test_frames_in_time_leave_no_room_for_pings(client: Client) -> None:
    steps: list[float | bytes | Exception] = [0.01, frame(b"x")] * 30
    await answer(client, Source(*steps), ping_s=0.1)
    assert PING not in client.body


@pytest.mark.parametrize("late", [False, True])
async def test_a_late_error_is_an_event_and_then_the_end(client: Client, late: bool) -> None:
    source = Source(0.2, EngineDied("gone")) if late else Source(frame(b"1"), EngineDied("gone"))
    await answer(client, source, ping_s=0.05)
    assert (
        b'data: {"error":{"message":"gone","type":"server_error","param":null,"code":"engine_died"}}'
        in client.body
    )
    assert client.body.endswith(b"}}\n\n" + DONE)
    assert source.closed


async def test_an_unexpected_late_error_tells_nothing(client: Client) -> None:
    await answer(client, Source(frame(b"1"), LookupError("SECRET")))
    assert b"internal_error" in client.body
    assert b"SECRET" not in client.body


@pytest.mark.parametrize("steps", [(60.0,), (frame(b"1"), 60.0)])
@pytest.mark.parametrize("ping_s", [0.05, 5])
async def test_a_client_that_leaves_closes_the_source_at_once(
    client: Client, steps: tuple[float | bytes, ...], ping_s: float
) -> None:
    source = Source(*steps)
    asyncio.get_running_loop().call_later(0.15, client.left.set)
    async with asyncio.timeout(1):
        if steps == (60.0,) and ping_s > 1:
            with pytest.raises(ClientGone):
                await answer(client, source, ping_s)
        else:
            await answer(client, source, ping_s)
    assert source.closed
    assert DONE not in client.body


async def test_a_cancelled_stream_closes_its_source(client: Client) -> None:
    source = Source(frame(b"1"), 60.0)
    task = asyncio.create_task(answer(client, source))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


async def test_work_is_cancelled_and_cleaned_up_when_the_client_leaves(client: Client) -> None:
    cleaned = False

    async def work() -> None:
        nonlocal cleaned
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned = True

    asyncio.get_running_loop().call_later(0.05, client.left.set)
    with pytest.raises(ClientGone):
        await unless_gone(client.receive, work())
    assert cleaned


def test_no_json_string_holds_what_ends_a_line_somewhere() -> None:
    raw = '"a\u2028b\u2029c\x85d\u00e9"'.encode()
    assert len(safe_lines(raw).decode().splitlines()) == 1
    assert safe_lines(b'"plain"') == b'"plain"'
