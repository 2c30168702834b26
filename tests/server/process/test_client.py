"""A real engine process at the other end: answers, aborts, deaths of every kind and no zombies."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.errors import EngineDied, OpenError, RequestError
from server.process import client as client_module
from server.process.client import EngineClient
from server.types import Generate, Open, SamplingParams, Tokens


def spec(backend: str = "toy-rows", **options: str) -> Open:
    return Open(backend=backend, variant="/nowhere", context=4096, parallel=8, options=options)


def request(name: str, max_tokens: int = 16) -> Generate:
    # a bias keeps the toy from ending by itself before max_tokens
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Generate(id=name, prompt=(1, 2, 3), params=params)


@contextlib.asynccontextmanager
async def engine(backend: str = "toy-rows", **options: str) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(spec(backend, **options))
    try:
        yield client
    finally:
        await client.stop()
        assert not alive(client.pid)


def alive(pid: int) -> bool:
    """Also True for a zombie."""
    return Path(f"/proc/{pid}").exists()


async def until(condition: object, seconds: float) -> None:
    assert callable(condition)
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        await asyncio.sleep(0.01)


async def collect(client: EngineClient, generate: Generate) -> list[int]:
    tokens: list[int] = []
    async for event in client.generate(generate):
        tokens += event.tokens
    return tokens


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
async def test_eight_streams_at_once_answer_as_one_alone(backend: str) -> None:
    async with engine(backend) as client:
        alone = await collect(client, request("alone"))
        together = await asyncio.gather(*(collect(client, request(f"r{i}")) for i in range(8)))
        assert len(alone) == 16
        assert together == [alone] * 8
        assert client.requests == 0


async def test_ready_status_and_tokens_reach_the_web_process() -> None:
    async with engine() as client:
        assert client.ready.backend == "toy-rows"
        assert client.ready.limits.running == 8
        assert client.ready.text is not None
        assert await client.tokenize("ab", add_special=False, parse_special=False) == [65, 66]
        with pytest.raises(RequestError, match="NUL"):
            await client.tokenize("\0", add_special=False, parse_special=False)
        await collect(client, request("a"))
        await until(lambda: client.status.generated_tokens == 16, 2)
        assert client.status.running == 0


async def test_a_refused_request_raises_its_own_error_and_the_engine_goes_on() -> None:
    async with engine() as client:
        with pytest.raises(RequestError):
            await collect(client, Generate(id="big", prompt=(1,) * 5000, params=SamplingParams(max_tokens=1)))
        assert len(await collect(client, request("next"))) == 16


async def test_a_client_that_leaves_aborts_at_once() -> None:
    async with engine(delay_s="0.01") as client:
        events = client.generate(request("long", 4000))
        await anext(events)
        await until(lambda: client.status.running == 1, 2)
        await events.aclose()
        await until(lambda: client.status.running == 0, 1)
        assert client.requests == 0


async def test_a_cancelled_consumer_aborts_at_once() -> None:
    async with engine(delay_s="0.01") as client:
        task = asyncio.create_task(collect(client, request("long", 4000)))
        await until(lambda: client.status.running == 1, 2)
        task.cancel()
        await until(lambda: client.status.running == 0, 1)
        assert client.requests == 0


async def test_sigkill_in_the_middle_of_eight_streams() -> None:
    deaths: list[EngineClient] = []
    client = await EngineClient.start(spec(delay_s="0.01"))
    client.on_death = deaths.append
    streams = [client.generate(request(f"r{i}", 4000)) for i in range(8)]
    for stream in streams:
        await anext(stream)
    tasks = [asyncio.create_task(_drain(stream)) for stream in streams]
    waiting = asyncio.create_task(client.tokenize("x", add_special=False, parse_special=False))
    await asyncio.sleep(0.05)
    await waiting
    os.kill(client.pid, signal.SIGKILL)
    started = time.monotonic()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert time.monotonic() - started < 2
    assert [type(outcome) for outcome in outcomes] == [EngineDied] * 8
    assert "SIGKILL" in str(outcomes[0])
    assert deaths == [client]
    assert client.dead
    with pytest.raises(EngineDied):
        await collect(client, request("late"))
    await client.stop()
    assert not alive(client.pid)


async def _drain(stream: AsyncIterator[Tokens]) -> None:
    async for _ in stream:
        pass


async def test_a_stopped_process_that_is_killed_fails_its_tokenizing_too() -> None:
    client = await EngineClient.start(spec())
    os.kill(client.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(client.tokenize("x", add_special=False, parse_special=False))
    await asyncio.sleep(0.05)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, 2)
    await client.stop()
    assert not alive(client.pid)


async def test_an_asked_for_stop_is_no_death() -> None:
    deaths: list[EngineClient] = []
    client = await EngineClient.start(spec())
    client.on_death = deaths.append
    await asyncio.gather(client.stop(), client.stop())
    await client.stop()
    assert deaths == []
    assert client.death == "exited with code 0"
    with pytest.raises(EngineDied):
        await collect(client, request("late"))


async def test_an_engine_that_does_not_listen_is_killed_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "SHUTDOWN_S", 0.2)
    monkeypatch.setattr(client_module, "TERMINATE_S", 0.2)
    client = await EngineClient.start(spec())
    os.kill(client.pid, signal.SIGSTOP)
    started = time.monotonic()
    await client.stop()
    assert time.monotonic() - started < 2
    assert client.death == "was killed by SIGKILL"
    assert not alive(client.pid)


async def test_an_unknown_backend_is_an_open_error_with_the_known_ones() -> None:
    with pytest.raises(OpenError, match="toy-rows"):
        await EngineClient.start(spec("no-such"))


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("ticks", [0, 1, 2, 3, 4, 6, 8, 12, 50])
async def test_a_cancelled_start_leaves_no_process(ticks: int) -> None:
    """At every moment: before the fork, between fork and connection, before the engine is ready."""
    before = children()
    task = asyncio.create_task(EngineClient.start(spec()))
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


def fake_engine(body: str) -> list[str]:
    """An engine that reads its first command and then misbehaves."""
    code = f"""
import os, socket, struct, sys, time
sock = socket.socket(fileno=int(sys.argv[1]))
(size,) = struct.unpack("!I", sock.recv(4, socket.MSG_WAITALL))
sock.recv(size, socket.MSG_WAITALL)
{textwrap.dedent(body)}
"""
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("body", "death"),
    [
        ("sock.sendall(b'\\0\\0\\0\\5hello'); time.sleep(60)", "sent what is not a message"),
        ("sock.sendall(b'\\xff' * 64); time.sleep(60)", "sent what is not a message"),
        ("sock.sendall(b'\\0\\0\\0\\x09hello'); sys.exit(3)", "exited with code 3"),
        ("sock.close(); time.sleep(60)", "closed its connection"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        # the end of file never comes: a child of the engine holds the socket
        (
            "if os.fork(): os._exit(4)\nos.set_inheritable(sock.fileno(), True); time.sleep(3)",
            "exited with code 4",
        ),
    ],
)
async def test_every_way_to_die_while_loading_is_told(
    body: str, death: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = fake_engine(body)
    monkeypatch.setattr(client_module, "python_module", lambda _, *arguments: [*command, *arguments])
    before = children()
    started = time.monotonic()
    with pytest.raises(EngineDied, match=death):
        await EngineClient.start(spec())
    assert time.monotonic() - started < 3
    assert children() == before


def test_the_engine_ends_by_itself_when_the_web_process_is_gone(tmp_path: Path) -> None:
    """The web process is killed while its engine computes; nobody can tell the engine."""
    program = """
import asyncio, os, signal, sys
from server.process.client import EngineClient
from server.types import Generate, Open, SamplingParams

async def main() -> None:
    spec = Open(backend="toy-rows", variant="/", context=4096, parallel=1, options={"delay_s": sys.argv[1]})
    client = await EngineClient.start(spec)
    stream = client.generate(Generate(id="a", prompt=(1,), params=SamplingParams(max_tokens=4000)))
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.2)
    print(client.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    for delay in ("0.01", "30"):
        done = subprocess.run(
            [sys.executable, "-c", program, delay], capture_output=True, text=True, timeout=30, check=False
        )
        pid = int(done.stdout)
        limit = time.monotonic() + 5
        while running(pid) and time.monotonic() < limit:
            time.sleep(0.02)
        assert not running(pid)


def running(pid: int) -> bool:
    """Not for zombies: whoever adopted the orphan may reap it late."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("head", [b"", struct.pack("!I", 10) + b"abc"])
def test_the_worker_ends_when_its_socket_ends_before_it_was_told_what_to_open(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "server.process.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        ours.sendall(head)
        ours.close()
        assert worker.wait(10) == 0


async def test_an_event_loop_that_ends_stops_its_engines_without_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a second SIGTERM: all tasks are cancelled."""
    deaths: list[EngineClient] = []
    async with engine() as client:
        client.on_death = deaths.append
        client._life.cancel()
        await asyncio.wait({client._life})
        await until(lambda: client._process.returncode is not None, 5)
    assert deaths == []
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
