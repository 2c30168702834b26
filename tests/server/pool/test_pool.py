"""Engines by name, with real engine processes: shared loads, deaths, quarantine, unloading, leaving."""

import asyncio
import os
import signal
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from server.errors import EngineDied, ModelLoading, ModelUnavailable, ShuttingDown, UnknownModel
from server.pool import policy
from server.pool.pool import Pool
from server.process import client as client_module
from server.types import Generate, SamplingParams
from tests.server.pool.support import answer, children, files, running, toy, until, write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "toy.gguf")


async def test_a_gguf_source_is_served_as_it_is_and_adds_no_file_the_second_time(
    tmp_path: Path, gguf: Path
) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        before = files(cache)
        async with running(cache, toy(gguf, aliases=("t",))) as pool, pool.acquire("t", wait_s=20) as lease:
            assert len(await answer(lease)) == 8
            served = lease.variant
            assert (served.id, served.format, served.backend, served.label) == (
                "toy:q4_0",
                "gguf",
                "toy-rows",
                "unmeasured",
            )
            assert lease.engine.ready.limits.context == 2048  # the file's own, less than the default
            assert await lease.text.encode("ab", add_special=False, parse_special=False) == [65, 66]
            assert pool.states()[0].variants == ("toy:q4_0",)
    assert files(cache) == before == {"digests.json", "memory.json"}


async def test_an_engine_is_started_without_keys(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of its environment."""
    for name in ("QUANTSERVE_API_KEYS", "QUANTSERVE_ADMIN_KEYS", "HF_TOKEN"):
        monkeypatch.setenv(name, "MARK")
    async with running(tmp_path / "cache", toy(gguf)) as pool, pool.acquire("toy", wait_s=20) as lease:
        environ = Path(f"/proc/{lease.engine.pid}/environ").read_bytes()
    assert b"HF_HUB_OFFLINE=1" in environ
    assert b"MARK" not in environ


async def test_requests_at_the_same_time_share_one_load(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:

        async def pid() -> int:
            async with pool.acquire("toy", wait_s=20) as lease:
                return lease.engine.pid

        pids = await asyncio.gather(*(pid() for _ in range(8)))
        assert len(set(pids)) == 1
        assert len(pool.engines()) == 1


@pytest.mark.parametrize(
    "name", ["nobody", "toy:q6_k", "toy:custom-01234567", "toy:../../etc/passwd", "toy:"]
)
async def test_an_unknown_name_is_refused_and_remembered_by_nobody(
    tmp_path: Path, gguf: Path, name: str
) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:
        with pytest.raises(UnknownModel):
            async with pool.acquire(name, wait_s=1):
                pass
        assert [state.state for state in pool.states()] == ["unloaded"]
        assert children() == []


async def test_who_waits_too_long_is_told_when_to_come_back_and_the_load_goes_on(
    tmp_path: Path, gguf: Path
) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:
        with pytest.raises(ModelLoading) as caught:
            async with pool.acquire("toy", wait_s=0):
                pass
        assert caught.value.retry_after == policy.LOADING_RETRY_S
        assert pool.states()[0].state == "loading"
        await until(lambda: pool.states()[0].state == "ready", 10)


async def test_cancelling_one_who_waits_does_not_cancel_the_load(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:

        async def ask() -> int:
            async with pool.acquire("toy", wait_s=None) as lease:
                return len(await answer(lease, id=str(id(lease))))

        first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
        await until(lambda: pool.states()[0].state == "loading", 5)
        first.cancel()
        assert await asyncio.wait_for(second, 10) == 8
        assert first.cancelled()


async def test_the_event_loop_runs_on_while_an_engine_starts(tmp_path: Path, gguf: Path) -> None:
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)

    async with running(tmp_path / "cache", toy(gguf)) as pool:
        ticking = asyncio.create_task(tick())
        started = time.monotonic()
        async with pool.acquire("toy", wait_s=20):
            took = time.monotonic() - started
        ticking.cancel()
    assert longest < took / 2


async def eight_streams(pool: Pool) -> tuple[list[BaseException | None], float]:
    """Kill the engine in the middle of eight streams: what each got, and how long after the kill."""
    started, go = asyncio.Semaphore(0), asyncio.Event()
    pids = set()

    async def stream(number: int) -> None:
        request = Generate(id=f"s{number}", prompt=(1, 2), params=SamplingParams(max_tokens=2000))
        async with (
            pool.acquire("toy", wait_s=20) as lease,
            aclosing(lease.engine.generate(request)) as events,
        ):
            pids.add(lease.engine.pid)
            async for _ in events:
                started.release()
                await go.wait()

    tasks = [asyncio.create_task(stream(number)) for number in range(8)]
    for _ in tasks:
        await started.acquire()
    (pid,) = pids
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return list(outcomes), time.monotonic() - killed


async def test_sigkill_in_the_middle_of_eight_streams_and_the_next_request(
    tmp_path: Path, gguf: Path
) -> None:
    async with running(tmp_path / "cache", toy(gguf), toy(gguf, "other")) as pool:
        async with pool.acquire("other", wait_s=20) as other:
            outcomes, seconds = await eight_streams(pool)
            assert [type(outcome) for outcome in outcomes] == [EngineDied] * 8
            assert seconds < 2
            assert len(await answer(other)) == 8
        asked = time.monotonic()
        async with pool.acquire("toy", wait_s=10) as lease:
            assert len(await answer(lease)) == 8
        assert time.monotonic() - asked < 10
        assert sum(state.restarts for state in pool.engines()) == 1
        assert len(children()) == 2  # and no zombie


async def kill(pool: Pool, name: str) -> None:
    async with pool.acquire(name, wait_s=20) as lease:
        os.kill(lease.engine.pid, signal.SIGKILL)
        await until(lambda: lease.engine.dead, 5)


async def test_three_deaths_are_quarantine_and_other_models_serve_on(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf), toy(gguf, "other")) as pool:
        for _ in range(3):
            await kill(pool, "toy")
        for _ in range(2):
            with pytest.raises(ModelUnavailable, match=r"3 times within 60 s.*SIGKILL") as caught:
                async with pool.acquire("toy", wait_s=20):
                    pass
            assert caught.value.retry_after is not None
            assert 0 < caught.value.retry_after <= policy.QUARANTINE_S
        states = {state.model.id: state for state in pool.states()}
        assert states["toy"].state == "quarantined"
        assert states["toy"].error is not None
        async with pool.acquire("other", wait_s=20) as lease:
            assert len(await answer(lease)) == 8


async def test_an_engine_that_others_kill_at_its_work_is_back_each_time(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:
        for _ in range(5):
            async with pool.acquire("toy", wait_s=20) as lease:
                assert len(await answer(lease)) == 8
            await kill(pool, "toy")
        assert pool.states()[0].state != "quarantined"


async def test_an_engine_is_unloaded_when_idle_and_loaded_again(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf, keep_alive=0.2)) as pool:
        async with pool.acquire("toy", wait_s=20) as lease:
            first = lease.engine
            await asyncio.sleep(0.5)
            assert not first.dead  # held
            assert len(await answer(lease)) == 8
        await until(lambda: pool.states()[0].state == "unloaded", 2)
        async with pool.acquire("toy", wait_s=20) as lease:
            assert lease.engine is not first
            assert first.dead
            assert len(await answer(lease)) == 8


async def test_unloading_never_hits_an_engine_that_somebody_uses(tmp_path: Path, gguf: Path) -> None:
    """keep_alive 0: every release of the last user unloads, while others come and go."""
    async with running(tmp_path / "cache", toy(gguf, keep_alive=0.0)) as pool:

        async def ask(number: int) -> int:
            total = 0
            for turn in range(6):
                await asyncio.sleep(0.013 * number)
                async with pool.acquire("toy", wait_s=30) as lease:
                    total += len(await answer(lease, id=f"{number}-{turn}"))
            return total

        assert await asyncio.gather(*(ask(number) for number in range(4))) == [48] * 4
        assert pool.states()[0].error is None


async def test_a_bad_source_is_told_to_every_waiter_and_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LONGEST_RETRY_S", 0.3)
    path = tmp_path / "late.gguf"
    path.write_bytes(b"not a GGUF file")
    async with running(tmp_path / "cache", toy(path)) as pool:

        async def ask() -> int:
            async with pool.acquire("toy", wait_s=20) as lease:
                return len(await answer(lease))

        outcomes = await asyncio.gather(*(ask() for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ModelUnavailable] * 3
        assert "this is no GGUF file" in str(outcomes[0])
        assert pool.states()[0].state == "failed"
        path.unlink()
        write_gguf(path)
        with pytest.raises(ModelUnavailable):
            await ask()  # within the pause: no second look
        await asyncio.sleep(0.35)
        assert await ask() == 8
        assert pool.states()[0].error is None


async def test_a_variant_that_no_backend_can_open_is_unavailable_with_its_reason(
    tmp_path: Path, gguf: Path
) -> None:
    async with running(tmp_path / "cache", toy(gguf, backend="no-such")) as pool:
        with pytest.raises(ModelUnavailable, match="no backend 'no-such'"):
            async with pool.acquire("toy", wait_s=20):
                pass


async def test_an_engine_that_dies_while_loading_is_tried_three_times_and_no_more(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"
    crash = f"open({str(marks)!r}, 'a').write('x'); import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr(client_module, "python_module", lambda *_: [sys.executable, "-c", crash])
    async with running(tmp_path / "cache", toy(gguf)) as pool:
        with pytest.raises(ModelUnavailable, match=r"SIGSEGV"):
            async with pool.acquire("toy", wait_s=20):
                pass
        assert pool.states()[0].state == "quarantined"
        assert marks.read_text() == "xxx"


async def test_a_preloaded_model_is_ready_without_a_request(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf, preload=True)) as pool:
        assert pool.states()[0].state in ("unloaded", "loading")
        await until(lambda: pool.states()[0].state == "ready", 10)
        assert pool.states()[0].served is not None


async def test_draining_refuses_newcomers_and_lets_others_finish(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:
        async with pool.acquire("toy", wait_s=20) as lease:
            pool.drain()
            closing = asyncio.create_task(pool.close(grace_s=10))
            with pytest.raises(ShuttingDown):
                async with pool.acquire("toy", wait_s=20):
                    pass
            assert len(await answer(lease)) == 8
            assert not closing.done()
        await asyncio.wait_for(closing, 5)
        assert children() == []


async def test_closing_ends_a_load_that_is_running(tmp_path: Path, gguf: Path) -> None:
    async with running(tmp_path / "cache", toy(gguf)) as pool:

        async def ask() -> None:
            async with pool.acquire("toy", wait_s=None):
                pass

        waiting = asyncio.create_task(ask())
        await until(lambda: len(children()) > 0, 10)
        await pool.close(grace_s=0)
        with pytest.raises(ShuttingDown):
            await waiting
