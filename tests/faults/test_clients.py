"""Clients that leave, dawdle or never read: nothing is left of them, and others are answered as before."""

import contextlib
import json
import random
import socket
import time
from pathlib import Path

import pytest

from tests.faults.servers import (
    COMPLETIONS,
    ENDLESS,
    SHORT,
    TINY,
    Server,
    amount,
    percentile,
    request,
    serving,
    told,
    toy_models,
    until,
)

SHORT_TOKENS = 4
UNREAD = json.dumps({**ENDLESS, "max_tokens": 60_000, "stream": True}).encode()


def leave(server: Server, how: int) -> None:
    """Before the body, in it, before the first token, in the middle of a stream, before a whole answer."""
    stream = json.dumps({**ENDLESS, "stream": True}).encode()
    whole = json.dumps({**ENDLESS, "stream": False}).encode()
    data = (
        request(COMPLETIONS, stream, cut=len(stream)),
        request(COMPLETIONS, stream, cut=10),
        request(COMPLETIONS, stream),
        request(COMPLETIONS, stream),
        request(COMPLETIONS, whole),
    )[how]
    with server.send(data) as connection:
        if how == 3:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")


def test_disconnects_leave_nothing(tmp_path: Path) -> None:
    """R6: a thousand of them."""
    count = amount(short=100, full=1000)
    with serving(tmp_path, toy_models(tmp_path, parallel=16)) as server:
        for how in range(5):  # warm
            for _ in range(8):
                leave(server, how)
        until(server.is_idle, 5)
        memory, files = server.memory(), server.files()
        for number in range(count):
            leave(server, number % 5)
        until(server.is_idle, 5)
        until(lambda: server.files() <= files + 2, 5)
        grown = server.memory() - memory
        told(f"R6: {count} disconnects, memory {grown / 2**20:+.1f} MiB, files {server.files() - files:+d}")
        assert grown <= 16 << 20
        for _ in range(amount(short=40, full=200)):
            with server.send(request(COMPLETIONS, json.dumps({**ENDLESS, "max_tokens": 10_000}).encode())):
                pass
        started = time.monotonic()
        assert server.post(COMPLETIONS, SHORT).status_code == 200
        assert time.monotonic() - started < 5
        assert "ERROR" not in server.log.read_text()


def latencies(server: Server, count: int) -> list[float]:
    """Of answers of SHORT_TOKENS, one after the other."""
    found = []
    for _ in range(count):
        started = time.monotonic()
        assert server.post(COMPLETIONS, SHORT).status_code == 200
        found.append(time.monotonic() - started)
    return found


@pytest.mark.slow
def test_slow_peers_do_not_slow_others(tmp_path: Path) -> None:
    """R7: half-open heads, slow bodies and streams that nobody reads, beside live traffic.

    The short form looks at what makes them harmless, which is the same however busy the machine is: streams
    that nobody reads are not computed. Its bounds on time only catch a server that stands still.
    """
    heads, bodies, streams = amount(100, 1000), amount(50, 500), amount(8, 64)
    with (
        serving(tmp_path, toy_models(tmp_path, parallel=80, kv_tokens=4_000_000)) as server,
        contextlib.ExitStack() as held,
    ):
        latencies(server, 20)
        idle = latencies(server, 200)

        def keep(data: bytes) -> socket.socket:
            return held.enter_context(server.send(data))

        half = [keep(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-") for _ in range(heads)]
        opened = time.monotonic()
        for _ in range(bodies):
            keep(request(COMPLETIONS, UNREAD, cut=20))
        for _ in range(streams):
            keep(request(COMPLETIONS, UNREAD))
        until(lambda: stand_still(server, streams), 60)
        stood_still = time.monotonic()
        before = server.metric("generation_tokens_total")
        busy = latencies(server, 200)
        assert server.metric("generation_tokens_total") - before == 200 * SHORT_TOKENS
        median, slowest = percentile(busy, 0.5), percentile(busy, 0.99)
        told(
            f"R7: {heads} heads, {bodies} bodies, {streams} streams that stood still after "
            f"{stood_still - opened:.1f} s; p50 {1000 * percentile(idle, 0.5):.1f} ms idle, "
            f"{1000 * median:.1f} beside them; p99 {1000 * percentile(idle, 0.99):.1f}, {1000 * slowest:.1f}"
        )
        assert median <= max(5 * percentile(idle, 0.5), 0.25)
        full = amount(short=0, full=1)
        assert slowest <= (max(2 * percentile(idle, 0.99), 0.05) if full else 5)
        if full:
            until(lambda: closed(random.Random(7).choice(half)), 45, pause_s=0.5)
            assert time.monotonic() - opened < 45


@pytest.mark.slow
def test_slow_peers_do_not_slow_others_of_llama(tmp_path: Path) -> None:
    """R7: eight slots; what nobody reads is computed to its short end, and then costs nothing."""
    heads, bodies, streams = amount(50, 1000), amount(25, 500), amount(8, 64)
    fields = f"source: {TINY}, variants: [q4_k_m], context: 512, threads: 1, preload: true"
    unread = json.dumps({**ENDLESS, "max_tokens": amount(20, 200), "stream": True}).encode()
    with (
        serving(tmp_path, f"models:\n  toy: {{{fields}}}\n") as server,
        contextlib.ExitStack() as held,
    ):
        latencies(server, 20)
        idle = latencies(server, amount(50, 200))
        opened = time.monotonic()
        for data, count in (
            (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-", heads),
            (request(COMPLETIONS, unread, cut=20), bodies),
            (request(COMPLETIONS, unread), streams),
        ):
            for _ in range(count):
                held.enter_context(server.send(data))
        meanwhile = latencies(server, 20)
        until(server.is_idle, 240, pause_s=0.5)
        over = time.monotonic()
        busy = latencies(server, amount(50, 200))
    slowest = percentile(busy, 0.99)
    told(
        f"R7 llama: {heads} heads, {bodies} bodies, {streams} unread streams, computed within "
        f"{over - opened:.1f} s; p50 {1000 * percentile(idle, 0.5):.0f} ms idle, "
        f"{1000 * percentile(meanwhile, 0.5):.0f} meanwhile, {1000 * percentile(busy, 0.5):.0f} after it; "
        f"p99 {1000 * percentile(idle, 0.99):.0f}, {1000 * percentile(meanwhile, 0.99):.0f}, "
        f"{1000 * slowest:.0f}"
    )
    assert percentile(meanwhile, 0.99) < amount(short=20, full=2)
    assert slowest <= (max(2 * percentile(idle, 0.99), 0.3) if amount(0, 1) else 5)


def test_streams_that_nobody_reads_make_way_and_are_closed(tmp_path: Path) -> None:
    """R7: they hold every slot, and others are answered; after a time they are cut, but no slow reader is."""
    text = toy_models(tmp_path, parallel=4, kv_tokens=300_000)
    with serving(tmp_path, text, QUANTSERVE_WRITE_WAIT="3") as server, contextlib.ExitStack() as held:
        for _ in range(4):
            held.enter_context(server.send(request(COMPLETIONS, UNREAD)))
        until(lambda: server.metric("num_requests_held") == 4, 30)
        assert server.post(COMPLETIONS, SHORT).status_code == 200
        slow = held.enter_context(server.send(request(COMPLETIONS, UNREAD)))

        def only_the_slow_one_is_left() -> bool:
            assert slow.recv(20_000)
            return server.log.read_text().count("its client has read nothing") == 4

        until(only_the_slow_one_is_left, 20, pause_s=0.3)
        # It may have made way itself, and comes back when it is read.
        until(lambda: bool(slow.recv(20_000)) and server.metric("num_requests_running") == 1, 10)
        for _ in range(15):
            assert slow.recv(20_000)
            time.sleep(0.3)
        slow.close()
        until(server.is_idle, 10)
        assert server.log.read_text().count("its client has read nothing") == 4


def stand_still(server: Server, streams: int) -> bool:
    """All are held, and stay so: a window that grows lets a stream go on for a moment."""
    before = server.metric("generation_tokens_total")
    if server.metric("num_requests_held") != streams:
        return False
    time.sleep(1)
    return server.metric("generation_tokens_total") == before


def closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True
