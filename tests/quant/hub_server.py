"""A hub on 127.0.0.1: the few routes that a snapshot needs, over folders of this machine."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
PIECE = 1 << 18
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
API = re.compile(r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class FakeHub:
    repos: dict[str, Path]
    revisions: tuple[str, ...] = ("main", COMMIT)
    requests: list[str] = field(default_factory=list)  # "METHOD path"
    endpoint: str = ""
    gated: frozenset[str] = frozenset()
    cuts: list[int] = field(default_factory=list)  # bytes after which answers with a file end, in turn
    ranges: dict[str, list[str]] = field(default_factory=dict)  # that were asked for, by file name
    false: frozenset[str] = frozenset()  # names of files that come with a byte changed
    breaks: Callable[[], bool] = lambda: False  # asked for each answer: it ends in the middle
    pause_s: float = 0.0  # between pieces of a file
    sent: int = 0  # bytes of files

    @property
    def downloads(self) -> list[str]:
        return [
            line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line
        ]


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[FakeHub]:
    hub = FakeHub(repos)

    class Handler(_Handler):
        state = hub

    server = _Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        found = API.fullmatch(path) or FILE.fullmatch(path)
        if not found or found["repo"] not in self.state.repos:
            return self._error(404, "RepoNotFound")
        if found["repo"] in self.state.gated:
            return self._error(403, "GatedRepo")
        if (found["revision"] or "main") not in self.state.revisions:
            return self._error(404, "RevisionNotFound")
        folder = self.state.repos[found["repo"]]
        if found.re is FILE:
            return self._file(folder / found["path"])
        if found["what"] == "tree":
            return self._json([_entry(path) for path in sorted(folder.iterdir())])
        return self._json(_model(found["repo"], folder))

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._error(404, "EntryNotFound")
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        if path.name in self.state.false:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        self.state.ranges.setdefault(path.name, []).append(asked)
        span = re.fullmatch(r"bytes=(\d+)-", asked)
        if span is None or self.command == "HEAD":
            return self._send(200, data, headers)
        start = int(span[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(206, data[start:], headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(data)

    def _write(self, data: bytes) -> None:
        """Whole, or up to somewhere and then no more."""
        whole = len(data) // 3 if self.state.breaks() else len(data)
        if self.state.cuts and "/resolve/" in self.path and len(data) > self.state.cuts[0]:
            whole = self.state.cuts.pop(0)
        for start in range(0, whole, PIECE):
            self.wfile.write(data[start : min(start + PIECE, whole)])
            self.state.sent += PIECE
            time.sleep(self.state.pause_s)
        self.close_connection = self.close_connection or whole < len(data)


def _entry(path: Path) -> dict[str, object]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sibling(path: Path, name: str) -> dict[str, object]:
    """Large files have a sha256, others the sha1 of git, as on the real hub."""
    data = path.read_bytes()
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    found: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
    if path.suffix in {".safetensors", ".gguf"}:
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 100}
    return found


def _model(repo: str, folder: Path) -> dict[str, object]:
    siblings = [_sibling(path, path.relative_to(folder).as_posix()) for path in _files(folder)]
    return {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
