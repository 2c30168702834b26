"""Engines that are killed or crash: their streams end soon, others never notice, the next is there."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.faults.servers import (
    COMPLETIONS,
    ENDLESS,
    SHORT,
    TINY,
    Server,
    amount,
    in_threads,
    is_zombie,
    serving,
    told,
    toy_models,
    until,
)

STREAMS = 64


class Streams:
    """Endless ones that have begun; `ends` holds what each got and when it ended."""

    def __init__(self, server: Server, count: int, model: str = "toy", max_tokens: int = 50_000) -> None:
        self.ends: list[tuple[str, float]] = []
        self.begun = threading.Semaphore(0)
        self.server = server
        self.body = {**ENDLESS, "model": model, "max_tokens": max_tokens, "stream": True}
        self.threads = in_threads(self._read, count)

    def _read(self, _: int) -> None:
        text = ""
        try:
            with httpx.stream("POST", f"{self.server.url}{COMPLETIONS}", json=self.body, timeout=120) as got:
                for part in got.iter_text():
                    if not text:
                        self.begun.release()
                    text = (text + part)[-2000:]
        except httpx.TransportError as error:
            text += type(error).__name__
        self.ends.append((text, time.monotonic()))

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=60)


def engines(server: Server, model: str) -> list[int]:
    status = server.http.get("/admin/status").json()
    return [engine["pid"] for engine in status["engines"] if engine["model"] == model]


@pytest.mark.slow
def test_an_engine_killed_with_64_streams_open(tmp_path: Path) -> None:
    """R4: again and again without a pause, which is no quarantine; another model's streams go on."""
    text = toy_models(tmp_path, "toy", "other", parallel=STREAMS, kv_tokens=5_000_000)
    with serving(tmp_path, text) as server:
        calm = Streams(server, 2, model="other")
        calm.wait_for(2)
        worst_end = worst_ready = 0.0
        rounds = amount(short=3, full=20)
        for _ in range(rounds):
            streams = Streams(server, STREAMS)
            streams.wait_for(STREAMS)
            [engine] = engines(server, "toy")
            os.kill(engine, signal.SIGKILL)
            killed = time.monotonic()
            for thread in streams.threads:
                thread.join(20)
            assert len(streams.ends) == STREAMS
            for got, moment in streams.ends:
                assert '"code":"engine_died"' in got
                assert got.endswith("data: [DONE]\n\n")
                worst_end = max(worst_end, moment - killed)
            assert server.post(COMPLETIONS, SHORT).status_code == 200
            worst_ready = max(worst_ready, time.monotonic() - killed)
            assert not any(is_zombie(pid) for pid in server.children())
        assert not any("engine_died" in got for got, _ in calm.ends)
        assert len(server.children()) == 2
        assert worst_end < 2, worst_end
        assert worst_ready < 10, worst_ready
        told(f"R4: {rounds} kills: streams end after {worst_end:.2f} s, ready after {worst_ready:.2f} s")


@pytest.mark.slow
def test_an_engine_of_llama_killed_while_most_wait(tmp_path: Path) -> None:
    """R4: streams that had begun end soon, the next engine answers the others and whoever comes new."""
    waiting, rounds = amount(short=16, full=STREAMS), amount(short=1, full=6)
    text = f"models:\n  toy: {{source: {TINY}, variants: [q4_k_m], context: 512, parallel: 8, threads: 1}}\n"
    worst_end = worst_ready = 0.0
    with serving(tmp_path, text) as server:
        assert server.post(COMPLETIONS, SHORT, timeout=120).status_code == 200
        for _ in range(rounds):
            streams = Streams(server, waiting, max_tokens=60)
            streams.wait_for(8)
            [engine] = engines(server, "toy")
            os.kill(engine, signal.SIGKILL)
            killed = time.monotonic()
            assert server.post(COMPLETIONS, SHORT).status_code == 200
            worst_ready = max(worst_ready, time.monotonic() - killed)
            for thread in streams.threads:
                thread.join(120)
            died = [moment - killed for got, moment in streams.ends if "engine_died" in got]
            odd = [got[-300:] for got, _ in streams.ends if not got.endswith("data: [DONE]\n\n")]
            assert odd == []
            assert len(streams.ends) == waiting
            assert len(died) <= 16
            assert sum('"error"' in got for got, _ in streams.ends) == len(died)
            worst_end = max([worst_end, *died])
            assert not any(is_zombie(pid) for pid in server.children())
    told(
        f"R4 llama: {rounds} kills, {waiting} streams: those that had begun end after {worst_end:.2f} s, "
        f"a new request is answered after {worst_ready:.2f} s"
    )
    assert worst_end < amount(short=10, full=2)
    assert worst_ready < amount(short=60, full=10)


def test_three_crashes_are_quarantine_and_other_models_never_notice(tmp_path: Path) -> None:
    """R5: SIGSEGV, as a native library's mistake gives it."""
    text = toy_models(tmp_path, "toy", "other", parallel=4)
    with serving(tmp_path, text) as server:
        calm = Streams(server, 2, model="other")
        calm.wait_for(2)
        first = server.post(COMPLETIONS, SHORT)
        assert first.status_code == 200
        for _ in range(3):
            crashing = Streams(server, 2)
            crashing.wait_for(2)
            [engine] = engines(server, "toy")
            os.kill(engine, signal.SIGSEGV)
            for thread in crashing.threads:
                thread.join(20)
            until(lambda: server.post(COMPLETIONS, SHORT).status_code in (200, 503), 20)
        refused = server.post(COMPLETIONS, SHORT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_unavailable"
        assert "SIGSEGV" in refused.json()["error"]["message"]
        assert 0 < int(refused.headers["retry-after"]) <= 600
        assert server.post(COMPLETIONS, {**SHORT, "model": "other"}).status_code == 200
        assert calm.ends == []


@pytest.mark.slow
def test_three_models_take_turns_in_room_for_two(tmp_path: Path) -> None:
    """R24: loaded, unloaded and evicted, with no leak, never beyond the budget, no answer cut."""
    text = toy_models(tmp_path, "a", "b", "c", parallel=2, preload="false")
    with serving(tmp_path, text, QUANTSERVE_MEMORY_BUDGET="50MiB") as server:
        for name in "abc":  # what each holds is measured while it is loaded
            server.post(COMPLETIONS, {**SHORT, "model": name})
            time.sleep(2.5)
        rng, last = random.Random(24), ""
        rounds = amount(short=6, full=500)
        memory = files = most = in_use = 0
        for number in range(rounds):
            name = rng.choice([one for one in "abc" if one != last])
            last = name
            if number % 5 == 2 and len(server.children()) == 2:  # so the budget has room for two
                in_use_while_others_come(server, name)
                in_use += 1
            answer = server.post(COMPLETIONS, {**SHORT, "model": name})
            assert answer.status_code == 200, answer.text
            memory_now = held(server)
            assert memory_now["held"] <= memory_now["budget"]
            most = max(most, memory_now["held"])
            if number == rounds // 2:
                memory, files = server.memory(), server.files()
        grown, opened = server.memory() - memory, server.files() - files
        evictions = server.metric("engine_evictions_total")
        told(
            f"R24: {rounds} rounds, {in_use} of them beside a stream, {evictions:.0f} evictions, "
            f"at most {most / 2**20:.1f} of 50 MiB, "
            f"web process {grown / 2**20:+.1f} MiB and {opened:+d} files in the second half"
        )
        assert in_use >= rounds // 10
        assert grown < 16 << 20
        assert abs(opened) <= 6
        assert evictions >= rounds // 5


def held(server: Server) -> dict[str, int]:
    found: dict[str, int] = server.http.get("/admin/status").json()["memory"]["ram"]
    return found


def in_use_while_others_come(server: Server, name: str) -> None:
    """A stream of one model is in use, read or not, while the two others take turns beside it."""
    body = {**ENDLESS, "model": name, "stream": True}
    with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=60) as stream:
        parts = stream.iter_text()
        text = next(parts)
        [engine] = engines(server, name)
        for other in "abc".replace(name, ""):
            assert server.post(COMPLETIONS, {**SHORT, "model": other}).status_code == 200
            assert engines(server, name) == [engine]
        text += "".join(next(parts) for _ in range(20))
    assert '"error"' not in text
