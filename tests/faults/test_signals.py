"""R9: a signal while an answer and a build are under way."""

import signal
import time
from pathlib import Path

import httpx
import pytest

from quant.store import VariantStore
from tests.faults.servers import (
    COMPLETIONS,
    ENDLESS,
    SHORT,
    TINY,
    Server,
    alive,
    serving,
    told,
    toy_models,
    until,
)


def busy(server: Server) -> None:
    """A build has begun; its model is the second of the file."""
    id = server.post("/quantize", {"model": "chat", "recipe": "q4_k_m"}).json()["id"]
    until(lambda: bool(server.http.get(f"/quantize/{id}").json()["progress"]), 60)


def models(tmp_path: Path) -> str:
    return f"{toy_models(tmp_path, parallel=4)}  chat: {{source: {TINY}, variants: [q8_0], context: 64}}\n"


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_in_the_middle_of_a_stream_and_a_build(tmp_path: Path, signals: int) -> None:
    with serving(tmp_path, models(tmp_path)) as server:
        busy(server)
        children = server.children()
        assert len(children) == 2
        body = {**ENDLESS, "max_tokens": 4000 if signals == 1 else 50_000, "stream": True}
        text = ""
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=60) as got:
            parts = got.iter_text()
            text += next(parts)
            server.process.send_signal(signal.SIGTERM)
            first = time.monotonic()
            assert refused(server)
            if signals == 2:
                server.process.send_signal(signal.SIGTERM)
            try:
                text += "".join(parts)
            except httpx.TransportError:
                assert signals == 2
        assert server.process.wait(40) == 0
        took = time.monotonic() - first
        until(lambda: not any(alive(pid) for pid in children), 10)
        log = server.log.read_text()
    finished = text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    assert finished == (signals == 1)
    assert took < (40 if signals == 1 else 4)
    assert "Traceback" not in log
    store = VariantStore(server.cache)
    assert store.damaged() == ()
    for variant in store.list():
        store.verify(variant.key)
    told(f"R9: {signals} SIGTERM within a stream and a build: ended after {took:.1f} s, nothing left")


@pytest.mark.parametrize("after_s", [0.05, 0.35, 0.6])
def test_a_second_signal_at_any_moment_ends_it_with_0(tmp_path: Path, after_s: float) -> None:
    """Also between the server's end and the process's, where Python would die of it."""
    with serving(tmp_path, toy_models(tmp_path)) as server:
        server.post(COMPLETIONS, SHORT)
        children = server.children()
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(after_s)
        assert server.process.wait(20) == 0
        until(lambda: not any(alive(pid) for pid in children), 10)


def refused(server: Server) -> bool:
    """A connection that was open gets 503, a new one none."""
    try:
        return server.post(COMPLETIONS, SHORT).status_code == 503
    except httpx.TransportError:
        return True
