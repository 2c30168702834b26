"""The server runs on uvloop, whose child processes and sockets are not asyncio's."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from pathlib import Path

import pytest
import uvloop

from quant.recipe import parse_recipe
from quant.store import VariantStore
from server.catalog import Model
from server.errors import EngineDied
from server.pool.jobs import Jobs
from server.settings import Settings
from tests.server.pool.support import answer, children, files, running, toy, until, write_gguf


def run(work: Coroutine[object, object, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def test_engines_live_and_die_on_uvloop(tmp_path: Path) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"))

    async def scenario() -> None:
        async with running(tmp_path / "cache", model) as pool:
            async with pool.acquire("toy", wait_s=20) as lease:
                assert len(await answer(lease)) == 8
                os.kill(lease.engine.pid, signal.SIGSTOP)
                asking = asyncio.create_task(answer(lease))
                await asyncio.sleep(0.05)
                os.kill(lease.engine.pid, signal.SIGKILL)
                with pytest.raises(EngineDied, match="SIGKILL"):
                    await asyncio.wait_for(asking, 2)
            async with pool.acquire("toy", wait_s=10) as lease:
                assert len(await answer(lease)) == 8
            assert len(children()) == 1

    run(scenario())


@pytest.mark.parametrize("ticks", [0, 1, 2, 3, 5, 8, 20])
def test_cancelled_starts_leave_nothing_on_uvloop(tmp_path: Path, ticks: int) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"))

    async def scenario() -> None:
        async with running(tmp_path / "cache", model) as pool:
            loading = pool._hosts.setdefault("toy:q4_0", await pool._host(model, "q4_0")).load()
            await until(lambda: len(children()) > 0, 10)
            for _ in range(ticks):
                await asyncio.sleep(0)
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loading
            assert children() == []

    run(scenario())


@pytest.mark.parametrize("ticks", [0, 2, 5, 20])
def test_builds_are_cancelled_on_uvloop(tmp_path: Path, tiny_chat: Path, ticks: int) -> None:
    async def scenario() -> None:
        jobs = Jobs(Settings(cache=tmp_path), VariantStore(tmp_path))
        job = await jobs.submit(Model(id="m", source=str(tiny_chat)), parse_recipe("f16"))
        await until(lambda: jobs.get(job.id).state == "running", 10)
        for _ in range(ticks):
            await asyncio.sleep(0)
        assert (await jobs.cancel(job.id)).state == "cancelled"
        assert children() == []
        await jobs.close()
        assert files(tmp_path) == {"digests.json", "jobs/jobs.sqlite3"}

    run(scenario())
