"""300 MB for three models of which two fit: asked for at random by eight clients.

Nothing fails but 503 with Retry-After, the engines' proportional set sizes never pass the budget, no answer
of a busy engine is cut, and how long requests wait is told.
"""

import json
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from server.process.devices import command_line, family, held_bytes
from tests.faults.servers import Server, amount, in_threads, percentile, serving, told, until
from tests.quant.checkpoints import write_checkpoint

BUDGET = 300_000_000
CLIENTS = 8
SHARED = Path(__file__).parents[3] / "shared" / "models" / "chat-34m"


def models(tmp_path: Path) -> tuple[str, list[str]]:
    """Two variants of one model of 34 M weights and one of a random model of 45 M."""
    chat = tmp_path / "chat"
    if SHARED.exists():
        shutil.copytree(SHARED, chat)
    else:
        write_checkpoint(chat, hidden=896, layers=5, dtype="F16")
    write_checkpoint(tmp_path / "random", hidden=1024, layers=5, dtype="F16")  # 47 M weights
    common = "context: 128, parallel: 4, threads: 1"
    text = (
        "models:\n"
        f"  chat: {{source: {chat}, variants: [f16, f32], {common}}}\n"
        f"  random: {{source: {tmp_path / 'random'}, variants: [f16], {common}}}\n"
    )
    return text, ["chat:f16", "chat:f32", "random:f16"]


class Clients:
    def __init__(self, server: Server, names: list[str], seconds: float) -> None:
        self.server, self.names = server, names
        self.until = time.monotonic() + seconds
        self.structured = SHARED.exists()  # the other model has no vocabulary to bound answers by
        self.statuses: Counter[int] = Counter()
        self.waits: list[float] = []
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def run(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=self.server.url, timeout=120) as http:
            while time.monotonic() < self.until:
                self._ask(http, rng)

    def _ask(self, http: httpx.Client, rng: random.Random) -> None:
        path, body = self._question(rng)
        started = time.monotonic()
        answer = http.post(path, json=body)
        with self._lock:
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.waits.append(time.monotonic() - started)
                if not is_whole(answer):
                    self.wrong.append(f"{answer.text[:300]} ... {answer.text[-400:]}")
            elif answer.status_code != 503 or "retry-after" not in answer.headers:
                self.wrong.append(f"{answer.status_code} {answer.text[:300]}")
        if answer.status_code == 503:
            time.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))

    def _question(self, rng: random.Random) -> tuple[str, dict[str, object]]:
        """Of all kinds that an engine holds more memory for than for plain ones."""
        name, draw = rng.choice(self.names), rng.random()
        body: dict[str, object] = {"model": name, "prompt": [5, 6, 7], "max_tokens": rng.choice((8, 24, 64))}
        if draw < 0.1:
            return "/v1/embeddings", {"model": name, "input": [[5, 6, 7], [8, 9]]}
        if draw < 0.2:
            return "/v1/completions", body | {"echo": True, "logprobs": 5, "prompt": [7] * 50}
        if draw < 0.4:
            return "/v1/completions", body | {"stream": True}
        if draw < 0.55 and self.structured:
            body |= {"model": rng.choice(self.names[:2]), "guided_json": {"type": "object"}}
        return "/v1/completions", body


def is_whole(answer: httpx.Response) -> bool:
    if "event-stream" in answer.headers["content-type"]:
        *events, last = answer.text.removesuffix("\n\n").split("\n\n")
        return last == "data: [DONE]" and all("error" not in json.loads(event[6:]) for event in events)
    found = answer.json()
    return found["object"] == "list" or found["choices"][0]["finish_reason"] in ("length", "stop")


@pytest.mark.slow
def test_eight_clients_on_a_budget(tmp_path: Path) -> None:
    text, names = models(tmp_path)
    with serving(tmp_path / "run", text, QUANTSERVE_MEMORY_BUDGET=str(BUDGET)) as server:
        for name in names:  # built beforehand
            model, recipe = name.split(":")
            server.post("/quantize", {"model": model, "recipe": recipe})
        until(lambda: all(job["state"] == "done" for job in server.http.get("/quantize").json()["data"]), 120)
        most, who = 0, list[tuple[int, bytes]]()
        clients = Clients(server, names, seconds=amount(short=15, full=300))
        threads = in_threads(clients.run, CLIENTS)
        while any(thread.is_alive() for thread in threads):
            held = {pid: held_bytes([pid]) for pid in family(server.process.pid)[1:]}
            if sum(held.values()) > most:
                most = sum(held.values())
                who = [(amount, command_line(pid)[-80:]) for pid, amount in held.items()]
            time.sleep(0.1)
        log = server.log.read_text()
    waits = clients.waits
    report = (
        f"budget: {len(waits)} answers, {dict(clients.statuses)}, p50 {percentile(waits, 0.5):.2f} s, "
        f"p95 {percentile(waits, 0.95):.2f} s, most {max(waits):.2f} s, most memory {most / 1e6:.0f} MB, "
        f"{log.count('is unloaded to make room')} evictions"
    )
    told(report)
    assert clients.wrong == []
    assert len(waits) > 8
    assert 0 < most <= BUDGET, (report, who)
    assert log.count("is unloaded to make room") >= 2
    assert "an engine that somebody uses" not in log
