"""R19: addresses and paths in every place that a request has. Nobody is called, and no file is read."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.servers import CHAT, COMPLETIONS, Server, serving, told, toy_models

SCHEMES = (
    "http://",
    "https://",
    "HTTP://",
    "//",
    "http:\\\\",
    "http:/\\",
    "ftp://",
    "gopher://",
    "git+http://",
)
HOSTS = (
    "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "0177.0.0.1",
    "127.1", "0", "127.0.0.1.", "user:pw@127.0.0.1", "LOCALHOST",
)  # fmt: skip
SECRET = "the content of a file of this machine"


class Canary:
    """Counts connections to a port of 127.0.0.1 and answers them with a redirect to itself."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.hits = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.hits += 1
            with connection:
                connection.sendall(
                    f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{self.port}/\r\n\r\n".encode()
                )


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    try:
        yield found
    finally:
        found.listener.close()


def forms(port: int, file: Path) -> list[str]:
    addresses = [f"http://{host}:{port}/x" for host in HOSTS]
    addresses += [f"{scheme}{host}:{port}/x" for scheme in SCHEMES[1:] for host in HOSTS[:5]]
    others = [
        f"http://127.0.0.1:{port}@example.invalid/", f"http://example.invalid#@127.0.0.1:{port}/",
        f"http%3A%2F%2F127.0.0.1%3A{port}", f"hf://127.0.0.1:{port}/x", f"s3://127.0.0.1:{port}/x",
        f"data:text/plain;base64,{'QUJD' * 4}", f"file://{file}", f"file://127.0.0.1{file}", f"FILE:{file}",
        str(file), f"../{file}", f"..{file}", f"../../../..{file}", f"....//....//{file}", f"%2e%2e%2f{file}",
        f"..\\..\\{file}", f"\\\\127.0.0.1\\{port}", f"~{file}", f"/proc/self/root{file}", f"{file}\x00.gguf",
    ]  # fmt: skip
    return addresses + others


def requests(form: str) -> list[tuple[str, dict[str, Any]]]:
    """Every place that takes a text, with the form in it."""
    ask: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    schema = {"$ref": form, "$schema": form, "$id": form}

    def content(*parts: dict[str, Any]) -> dict[str, Any]:
        return {**ask, "messages": [{"role": "user", "content": list(parts)}]}

    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {**schema, "type": "object"}}}
    gptq = {"method": "gptq", "format": "gptq", "calibration": {"corpus": form}}
    return [
        (COMPLETIONS, {"model": form, "prompt": "a"}),
        ("/v1/embeddings", {"model": form, "input": "a"}),
        ("/tokenize", {"model": form, "prompt": "a"}),
        (CHAT, {**ask, "model": f"toy:{form}"}),
        (CHAT, content({"type": "image_url", "image_url": {"url": form}})),
        (CHAT, content({"type": "file", "file": {"file_data": form, "file_id": form}})),
        (CHAT, content({"type": "input_audio", "input_audio": {"data": form, "format": "wav"}})),
        (CHAT, {**ask, "response_format": response_format}),
        (CHAT, {**ask, "tools": [tool]}),
        (CHAT, {**ask, "chat_template": form, "chat_template_kwargs": {"template": form}}),
        (CHAT, {**ask, "user": form, "metadata": {"url": form}, "webhook": form}),
        ("/v1/messages", content({"type": "image", "source": {"type": "url", "url": form}})),
        ("/v1/responses", {"model": "toy", "input": [{"type": "input_image", "image_url": form}]}),
        ("/quantize", {"model": form, "recipe": "q8_0"}),
        ("/quantize", {"model": "toy", "recipe": form}),
        ("/quantize", {"model": "toy", "recipe": {"type": "q8_0", "imatrix": form}}),
        ("/quantize", {"model": "toy", "recipe": gptq}),
        ("/admin/pull", {"model": form}),
        ("/admin/promote", {"model": form, "variant": form}),
    ]


def test_nobody_is_called_and_no_file_is_read(tmp_path: Path, canary: Canary) -> None:
    file = tmp_path / "secret.gguf"
    file.write_text(SECRET)
    texts, statuses = list[str](), set[int]()
    with serving(tmp_path / "run", toy_models(tmp_path, parallel=4), HF_HUB_OFFLINE="0") as server:
        every = forms(canary.port, file)
        for form in every:
            for path, body in requests(form):
                headers = {
                    "Content-Type": "application/json",
                    "Referer": quotable(form),
                    "Origin": quotable(form),
                }
                answer = server.http.post(path, content=json.dumps(body), headers=headers)
                statuses.add(answer.status_code)
                texts.append(answer.text)
        jobs = server.http.get("/quantize").json()["data"]
        log = server.log.read_text()
    told(f"R19: {len(every)} forms in {len(requests(''))} places, canary called {canary.hits} times")
    assert len(every) >= 60
    assert canary.hits == 0
    assert jobs == []
    assert statuses <= {200, 400, 403, 404, 405, 422}
    assert not any(SECRET in text or str(file) in text for text in texts)
    assert SECRET not in log
    socket.create_connection(("127.0.0.1", canary.port)).close()  # the canary lives
    for _ in range(100):
        if canary.hits:
            break
        threading.Event().wait(0.02)
    assert canary.hits == 1


def quotable(form: str) -> str:
    return form.replace("\x00", "").replace("\\", "/")


def test_names_that_lead_elsewhere_are_unknown(tmp_path: Path) -> None:
    names = ("../toy", "..%2ftoy", "toy/../../x", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "toy:../x")
    with serving(tmp_path, toy_models(tmp_path, preload="false")) as server:
        for name in names:
            answer = server.post(COMPLETIONS, {"model": name, "prompt": "a"})
            assert answer.status_code == 404, name
            assert answer.json()["error"]["code"] == "model_not_found"
            assert looked_up(server, name).startswith(b"HTTP/1.1 404 "), name


def looked_up(server: Server, name: str) -> bytes:
    head = f"GET /v1/models/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with server.send(head.encode()) as connection:
        return connection.recv(100)
