"""`quantserve serve` on the bundled model, and `quantserve chat` with it."""

import json
import os
import pty
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server.cli.conftest import Cli, command, environment

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server(
    session_cache: Path, gguf_q4: Path, tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """tiny-chat as a SOURCE, its q4_k_m built before. Ended by SIGTERM, which must give exit 0."""
    assert gguf_q4.is_relative_to(session_cache)
    port, folder = free_port(), tmp_path_factory.mktemp("serve")
    options = ["--ctx", "256", "--parallel", "2", "--port", str(port), "--cache", str(session_cache)]
    running = Running(f"http://127.0.0.1:{port}", folder / "log")
    with running.log.open("w") as log:
        child = subprocess.Popen(
            command("serve", tiny_chat, *options), env=environment(folder), cwd=folder, stderr=log
        )
    try:
        wait_until_said(running.log, f"tiny-chat:q4_k_m is ready at {running.url}/v1", child)
        yield running
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=15) == 0
    finally:
        child.kill()
        child.wait()


def wait_until_said(log: Path, words: str, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + READY_S
    while words not in log.read_text():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_source_is_served_under_its_base_name(server: Running) -> None:
    assert server.get("/ready")["status"] == "ready"
    assert server.get("/v1/models")["data"][0]["id"] == "tiny-chat"


def test_what_was_built_before_is_not_built_again(server: Running, session_cache: Path) -> None:
    said = server.log.read_text()
    assert "loading" in said
    assert "quantize" not in said
    assert "convert" not in said


def test_chat_answers_what_is_piped_in(cli: Cli, server: Running) -> None:
    asked = "Hello!\n\n/reset\nHow are you?\n/quit\nnever asked\n"
    done = cli("chat", "--url", server.url, "--max-tokens", "4", stdin=asked)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.strip()) > 2


def test_chat_on_a_terminal_goes_on_after_a_refusal(server: Running, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command("chat", "other", "--url", server.url),
        env=environment(tmp_path, TERM="dumb"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        os.write(ours, b"Hello!\n/quit\n")
        assert child.wait(timeout=30) == 0
        shown = os.read(ours, 65536).decode()
    finally:
        child.kill()
        os.close(ours)
    assert "> " in shown
    assert "no such model; this server has: tiny-chat" in shown


def test_chat_with_a_model_that_is_not_there(cli: Cli, server: Running) -> None:
    done = cli("chat", "other", "--url", server.url + "/v1/", stdin="Hello!\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quantserve: no such model; this server has: tiny-chat\n"


def test_chat_without_a_server(cli: Cli) -> None:
    port = free_port()
    for arguments in (["chat"], ["chat", "tiny-chat"]):
        done = cli(*arguments, stdin="Hello!\n", QUANTSERVE_PORT=str(port))
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"quantserve: no server answers at http://127.0.0.1:{port} (")
        assert (done.returncode, done.stdout) == (1, "")


def test_chat_with_something_that_is_no_server_of_models(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        child = subprocess.Popen(
            command("chat", "--url", url), env=environment(Path.cwd()), stderr=subprocess.PIPE, text=True
        )
        peer, _ = mute.accept()
        peer.recv(4096)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        peer.close()
        _, said = child.communicate(timeout=30)
    assert said.startswith(f"quantserve: {url} offers no model")
    assert child.returncode == 1


def test_bars_go_to_a_terminal_only(server: Running) -> None:
    assert "\x1b" not in server.log.read_text()
