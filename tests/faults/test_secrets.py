"""R21: what clients send stays out of logs, metrics and errors, and a flood does not fill the log."""

import contextlib
import json
import os
import random
import secrets
import subprocess
from pathlib import Path

import httpx

from tests.faults.servers import COMPLETIONS, REPO, Server, amount, serving, toy_models, until
from tests.quant.checkpoints import write_checkpoint

MARKERS = 200


def marked(rng: random.Random, server: Server, mark: str) -> None:
    """A request that carries the mark somewhere: taken, refused, or broken."""
    http = server.http
    body: dict[str, object] = {"model": "toy", "prompt": mark, "max_tokens": 2}
    match rng.randrange(10):
        case 0:
            http.post(COMPLETIONS, json=body)
        case 1:
            http.post(COMPLETIONS, json={**body, "temperature": mark})
        case 2:
            http.post(COMPLETIONS, json={**body, mark: mark})
        case 3:
            http.post(COMPLETIONS, json=body, headers={"Authorization": f"Bearer {mark}", "X-Other": mark})
        case 4:
            http.post(f"/v1/{mark}", json=body)
        case 5:
            http.post(COMPLETIONS, content=f'{{"model": "{mark}", "prompt": '.encode())
        case 6:
            http.post(COMPLETIONS, json={**body, "model": mark})
        case 7:
            http.post("/quantize", json={"model": "toy", "recipe": {"type": mark}})
        case 8:
            form = {"type": "json_schema", "json_schema": {"name": mark, "schema": {"type": mark}}}
            http.post(COMPLETIONS, json={**body, "response_format": form})
        case _:
            http.get(f"/v1/models/{mark}", headers={"Last-Event-ID": mark})


def told_to_operators(server: Server) -> str:
    """Metrics, every /admin/* and /quantize answer, and all that is kept of each job."""
    paths = ["/metrics", "/admin/status", "/admin/report/toy", "/quantize", "/v1/models"]
    for job in server.http.get("/quantize").json()["data"]:
        paths += [f"/quantize/{job['id']}{part}" for part in ("", "/log", "/events")]
    return "".join(server.http.get(path, headers={"Last-Event-ID": "0"}).text for path in paths)


def test_no_marker_appears_anywhere(tmp_path: Path) -> None:
    rng, answers = random.Random(21), list[httpx.Response]()
    marks = [f"mark{secrets.token_hex(8)}" for _ in range(MARKERS)]
    keys = tmp_path / "keys"
    keys.write_text(f"{marks[0]}\n")
    text = toy_models(tmp_path, parallel=4)
    text += f"  m: {{source: {write_checkpoint(tmp_path / 'model')}, variants: [f16], context: 64}}\n"
    with serving(tmp_path, text, QUANTSERVE_LOG_FORMAT="json") as server:
        server.http.event_hooks["response"] = [answers.append]
        for mark in marks:
            marked(rng, server, mark)
        ask = {"model": "m", "recipe": "q8_0"}
        job = server.post("/quantize", ask, headers={"X-Request-Id": "same", "X-Other": marks[1]}).json()[
            "id"
        ]
        until(lambda: server.http.get(f"/quantize/{job}").json()["state"] == "done", 60)
        flood = b"x" * 1_000_000
        before = server.log.stat().st_size
        for _ in range(3):
            with contextlib.suppress(httpx.TransportError):  # closed in the middle
                server.http.post(COMPLETIONS, content=iter([flood] * amount(short=70, full=200)))
        assert server.log.stat().st_size - before < 10_000
        refused = [answer for answer in answers if answer.status_code >= 400]
        errors = "".join(answer.text for answer in refused if answer.read())
        heads = "".join(f"{name}: {value}\n" for answer in refused for name, value in answer.headers.items())
        seen = server.log.read_text() + told_to_operators(server) + errors + heads.lower()
        listening = subprocess.run(["ss", "-lntp"], capture_output=True, text=True, check=False).stdout
        ports = {line.split()[3] for line in listening.splitlines() if f"pid={server.process.pid}," in line}
    assert [mark for mark in marks if mark in seen] == []
    assert str(tmp_path) not in errors
    for line in server.log.read_text().splitlines():
        assert len(line.encode()) <= 2048
        if line.startswith("{"):
            json.loads(line)
    if listening:
        assert ports == {f"127.0.0.1:{server.port}"}


def test_a_builds_log_names_no_folder(tmp_path: Path) -> None:
    """What libraries say of the cache and the source is told without their places."""
    model = write_checkpoint(tmp_path / "private" / "model")
    text = f"models:\n  m: {{source: {model}, variants: [f16], context: 64}}\n"
    path = f"{Path(__file__).with_name('talking')}{os.pathsep}{REPO}"
    with serving(tmp_path / "run", text, PYTHONPATH=path) as server:
        id = server.post("/quantize", {"model": "m", "recipe": "q8_0"}).json()["id"]
        until(lambda: server.http.get(f"/quantize/{id}").json()["state"] == "done", 60)
        log = server.http.get(f"/quantize/{id}/log").text
        events = server.http.get(f"/quantize/{id}/events", headers={"Last-Event-ID": "0"}).text
    assert "<cache>" in log
    assert "<source>" in log
    assert str(server.cache) not in log + events
    assert str(model) not in log + events
