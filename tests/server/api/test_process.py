"""The server as a process with real sockets: clients that leave, engines that die, signals."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.api.support import COMPLETIONS

ENDLESS = {"model": "toy", "prompt": [5], "max_tokens": 50_000, "temperature": 0}  # the toy never ends on 5


class Running:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def gauge(self, name: str) -> float:
        found = re.search(rf"^quantserve:{name}{{.*}} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else -1.0

    def engines(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.server.api.toyserver", str(tmp_path), str(port)]
    log = tmp_path / "log"
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        running = Running(process, port, log)
        try:
            until(lambda: ready(running), 30)
            yield running
        finally:
            running.http.close()
            process.kill()


def ready(running: Running) -> bool:
    assert running.process.poll() is None, running.log.read_text()
    with contextlib.suppress(httpx.TransportError):
        return running.http.get("/ready").status_code == 200
    return False


def until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def request(body: object, *, cut: int = 0) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    return whole[: len(whole) - cut]


def idle(server: Running) -> bool:
    return server.gauge("num_requests_running") == 0 == server.gauge("num_requests_waiting")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(server: Running, stream: bool) -> None:
    connection = server.send(request({**ENDLESS, "stream": stream, "n": 3}))
    until(lambda: server.gauge("num_requests_running") == 3, 5)
    connection.close()
    until(lambda: idle(server), 1)


def test_a_client_that_closes_its_sending_half_counts_as_gone(server: Running) -> None:
    with server.send(request({**ENDLESS, "stream": True})) as connection:
        until(lambda: server.gauge("num_requests_running") == 1, 5)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: idle(server), 1)
    with server.send(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")  # the head alone


def test_many_clients_leave_at_every_stage_and_nothing_is_left(server: Running) -> None:
    body = {**ENDLESS, "stream": True}
    server.http.get("/health")
    before = server.files()
    for round in range(60):
        match round % 5:
            case 0:
                connection = server.send(request(body, cut=len(json.dumps(body))))  # before the body
            case 1:
                connection = server.send(request(body, cut=10))
            case 2:
                connection = server.send(request(body))
            case 3:
                connection = server.send(request(body))
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
            case _:
                connection = server.send(request({**body, "stream": False}))
        connection.close()
    until(lambda: idle(server), 5)
    until(lambda: server.files() <= before + 2, 5)
    answer = server.http.post(COMPLETIONS, json={**ENDLESS, "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert "ERROR" not in server.log.read_text()


def until_all_have_begun(server: Running) -> None:
    """Sequences that run together get a token each in every step."""
    before = server.gauge("generation_tokens_total")
    until(lambda: server.gauge("generation_tokens_total") > before + 160, 30)


def test_a_killed_engine_fails_its_streams_and_the_next_request_is_answered(server: Running) -> None:
    ends: list[tuple[str, float]] = []

    def read() -> None:
        with httpx.stream(
            "POST", f"{server.http.base_url}{COMPLETIONS}", json={**ENDLESS, "stream": True}
        ) as got:
            text = "".join(got.iter_text())
        ends.append((text, time.monotonic()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: server.gauge("num_requests_running") == 8, 30)
    until_all_have_begun(server)
    [engine] = server.engines()
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert len(ends) == 8
    for text, moment in ends:
        assert moment - killed < 2
        assert '"code":"engine_died"' in text
        assert text.endswith("data: [DONE]\n\n")
    assert server.http.post(COMPLETIONS, json={**ENDLESS, "max_tokens": 3}).status_code == 200
    assert time.monotonic() - killed < 10


def test_requests_that_had_not_begun_are_answered_by_the_next_engine(server: Running) -> None:
    def stream() -> None:
        url = f"{server.http.base_url}{COMPLETIONS}"
        with httpx.stream("POST", url, json={**ENDLESS, "stream": True}) as got:
            got.read()

    statuses: list[int] = []

    def ask() -> None:
        url = f"{server.http.base_url}{COMPLETIONS}"
        long = {**ENDLESS, "max_tokens": 200}  # a short one would go by the express lane
        statuses.append(httpx.post(url, json=long, timeout=20).status_code)

    busy = [threading.Thread(target=stream) for _ in range(16)]
    for thread in busy:
        thread.start()
    until(lambda: server.gauge("num_requests_running") == 16, 30)
    until_all_have_begun(server)
    prompts = server.gauge("prompt_tokens_total")
    [engine] = server.engines()
    os.kill(engine, signal.SIGSTOP)  # what comes now it cannot begin
    waiting = [threading.Thread(target=ask) for _ in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(1)
    assert statuses == []
    os.kill(engine, signal.SIGKILL)
    for thread in [*busy, *waiting]:
        thread.join(20)
    assert statuses == [200] * 4
    assert server.gauge("prompt_tokens_total") - prompts == 4  # each of them counts once, by its answer
    until(lambda: server.gauge("e2e_request_latency_seconds_count") == 16 + 4, 5)


def test_a_signal_lets_running_answers_finish(server: Running) -> None:
    engines = server.engines()
    body = {**ENDLESS, "max_tokens": 3000, "stream": True}
    with httpx.stream("POST", f"{server.http.base_url}{COMPLETIONS}", json=body) as got:
        lines = got.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"finish_reason":"length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(10) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)


def test_a_second_signal_ends_it_at_once(server: Running) -> None:
    engines = server.engines()
    connection = server.send(request({**ENDLESS, "stream": True}))
    connection.recv(64)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < 4
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines), 4)
    connection.close()


def test_a_head_without_end_is_refused(server: Running) -> None:
    with server.send(b"GET /health HTTP/1.1\r\nX-Big: ") as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(b"a" * 4096)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(4096).startswith(b"HTTP/1.1 431 ")
    assert server.http.get("/health").status_code == 200


def test_bodies_as_large_as_allowed_do_not_count_as_heads(server: Running) -> None:
    body = {**ENDLESS, "max_tokens": 1, "x": "a" * 3_000_000}
    for _ in range(3):
        assert server.http.post(COMPLETIONS, json=body).status_code == 200


def test_the_web_process_stays_light(server: Running) -> None:
    for _ in range(100):
        server.http.post(COMPLETIONS, json={**ENDLESS, "max_tokens": 3})
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    assert int(found[1]) < 150 * 1024
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert not re.search(r"libtorch|libllama|libggml|bitsandbytes", loaded)
