"""Whole servers as processes, to be asked, stopped, frozen and killed.

`toy` models answer with the toy backend, so that a test times the server and not a model.
"""

import contextlib
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
from typing import Any

import httpx

REPO = Path(__file__).parents[2]
TINY = REPO / "models" / "tiny-chat"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDLESS = {"model": "toy", "prompt": [5], "max_tokens": 50_000, "temperature": 0}  # the toy never ends on 5
SHORT = {"model": "toy", "prompt": [7, 8], "max_tokens": 4, "temperature": 0}


def amount(short: int, full: int) -> int:
    """How much of something a test does: `full` with QUANTSERVE_FAULTS=full (make test-faults)."""
    return full if os.environ.get("QUANTSERVE_FAULTS") == "full" else short


def told(figures: str) -> None:
    """For docs/reliability.md: shown with pytest -s, and kept where QUANTSERVE_FAULTS_REPORT names a file."""
    line = f"{time.strftime('%Y-%m-%d')} {figures}\n"
    sys.stdout.write(line)
    if path := os.environ.get("QUANTSERVE_FAULTS_REPORT"):
        with Path(path).open("a") as stream:
            stream.write(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], bool], seconds: float, pause_s: float = 0.02) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(pause_s)


class Server:
    """`quantserve serve` with a models.yaml and a cache below `folder`; started again on the same port."""

    def __init__(self, folder: Path, models: str, **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.cache = folder, folder / "cache"
        self.models = folder / "models.yaml"
        self.models.write_text(models)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("QUANTSERVE_")},
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "QUANTSERVE_CACHE": str(self.cache),
            "QUANTSERVE_MODELS": str(self.models),
            "QUANTSERVE_PORT": str(self.port),
            "QUANTSERVE_MEASURE_BUDGET": "0",
            **environ,
        }
        self.log = folder / "log"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.process: subprocess.Popen[bytes]

    def start(self, *, ready: bool = True) -> "Server":
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve"],
                stdout=stream,
                stderr=stream,
                env=self.environ,
                cwd=self.folder,
            )
        if ready:
            until(self.is_ready, 60)
        return self

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False

    def kill(self) -> None:
        """SIGKILL; returns when its children are gone, too."""
        children = self.children()
        self.process.kill()
        self.process.wait()
        until(lambda: not any(alive(pid) for pid in children), 10)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.process.kill()
        self.process.wait()

    # -- what it says -----------------------------------------------------------------------------

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series that have the labels; -1 where there are none."""
        text = self.http.get("/metrics").text
        found = re.findall(rf"^quantserve:{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        values = [float(value) for given, value in found if labels.items() <= labels_of(given).items()]
        return sum(values) if values else -1.0

    def is_idle(self) -> bool:
        return self.metric("num_requests_running") <= 0 and self.metric("num_requests_waiting") <= 0

    # -- what the machine says of it ---------------------------------------------------------------

    def children(self) -> list[int]:
        """Of the web process: engines and builders, zombies included."""
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError):
            lists = Path(f"/proc/{pid}/task").glob("*/children")
            return [int(child) for path in lists for child in path.read_text().split()]
        return []

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory(self) -> int:
        """Resident bytes of the web process."""
        return resident(self.process.pid)

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection


def labels_of(text: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', text))


def resident(pid: int, field: str = "VmRSS") -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def alive(pid: int) -> bool:
    """A zombie is not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


@contextlib.contextmanager
def serving(folder: Path, models: str, **environ: str) -> Iterator[Server]:
    server = Server(folder, models, **environ)
    try:
        yield server.start()
    finally:
        server.close()


def toy_models(folder: Path, *names: str, **fields: object) -> str:
    """models.yaml with toys of that name, loaded at the start."""
    from tests.server.pool.support import write_gguf

    folder.mkdir(parents=True, exist_ok=True)
    text = "models:\n"
    for name in names or ("toy",):
        path = write_gguf(folder / f"{name}.gguf", context=65_536)
        every = {"source": path, "backend": "toy-rows", "context": 65_536, "preload": "true", **fields}
        text += f"  {name}:\n" + "".join(f"    {key}: {value}\n" for key, value in every.items())
    return text


def request(path: str, data: bytes, *, cut: int = 0) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    return whole[: len(whole) - cut]


def in_threads(work: Callable[[int], None], count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
