"""Engines within a budget of memory: unloaded for each other, waited for, refused, replaced by smaller."""

import asyncio
from pathlib import Path

import pytest

from quant.recipe import parse_recipe
from quant.store import VariantStore
from server.catalog import Catalog, Model
from server.errors import MemoryBusy, ModelUnavailable
from server.pool import memory
from server.pool import pool as pool_module
from server.pool.estimate import ENGINE
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.settings import Settings
from tests.quant.checkpoints import write_checkpoint
from tests.server.pool.support import answer, children, toy, until, write_gguf

TOY = ENGINE["toy-rows"]


def pool_with(cache: Path, budget: int, *models: Model) -> Pool:
    settings = Settings(cache=cache, memory_budget=budget)
    store = VariantStore(cache)
    return Pool(settings, Catalog(models), store, Jobs(settings, store))


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates stay what they are, however long a test takes."""
    monkeypatch.setattr(pool_module, "MEASURE_S", 3600.0)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "toy.gguf")


async def ask(pool: Pool, name: str, hold: asyncio.Event | None = None, wait_s: float | None = 60) -> str:
    async with pool.acquire(name, wait_s=wait_s) as lease:
        assert len(await answer(lease, id=f"{name}-{id(lease)}")) == 8
        if hold is not None:
            await hold.wait()
            assert len(await answer(lease, id=f"{name}-{id(lease)}-2")) == 8
        return lease.variant.id


async def test_three_models_share_room_for_two_and_nobody_in_use_is_unloaded(
    tmp_path: Path, gguf: Path
) -> None:
    models = [toy(gguf, name) for name in ("a", "b", "c")]
    pool = pool_with(tmp_path / "cache", int(2.5 * TOY), *models)
    await pool.start()
    try:
        hold = asyncio.Event()
        using = asyncio.create_task(ask(pool, "a", hold))
        await until(lambda: pool.states()[0].state == "ready", 20)
        for name in ("b", "c", "b"):
            assert await ask(pool, name) == f"{name}:q4_0"
            assert len(pool.engines()) <= 2
            assert pool.memory.held["ram"] <= pool.memory.budgets["ram"]
        assert pool.memory.evictions == {"b:q4_0": 1, "c:q4_0": 1}
        hold.set()
        assert await using == "a:q4_0"
        resting = pool.states()[2]
        assert (resting.state, resting.rests, resting.error) == ("unloaded", True, None)
    finally:
        await pool.close(grace_s=0)
    assert children() == []
    assert pool.memory.held["ram"] == 0


async def test_who_waits_for_busy_engines_has_its_turn_or_is_told_to_come_back(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PATIENCE_S", 0.2)
    pool = pool_with(tmp_path / "cache", int(1.5 * TOY), toy(gguf, "a"), toy(gguf, "b"))
    pool.memory.wait_s = 1.0
    await pool.start()
    try:
        hold = asyncio.Event()
        using = asyncio.create_task(ask(pool, "a", hold))
        await until(lambda: len(pool.engines()) == 1, 20)
        with pytest.raises(MemoryBusy) as caught:
            await ask(pool, "b")
        assert caught.value.retry_after
        pool.memory.wait_s = 60.0
        waiting = asyncio.create_task(ask(pool, "b"))
        await until(lambda: pool.memory.yields("a:q4_0"), 30)
        late = asyncio.create_task(ask(pool, "a"))  # must not keep b waiting for ever
        await asyncio.sleep(0.1)
        assert not late.done()
        hold.set()
        assert [*await asyncio.gather(using, waiting, late)] == ["a:q4_0", "b:q4_0", "a:q4_0"]
        assert pool.memory.evictions["a:q4_0"] == 1
    finally:
        await pool.close(grace_s=0)
    assert children() == []


async def test_what_is_larger_than_the_budget_is_refused_with_both_figures(
    tmp_path: Path, gguf: Path
) -> None:
    pool = pool_with(tmp_path / "cache", TOY // 2, toy(gguf, "a"))
    await pool.start()
    try:
        with pytest.raises(ModelUnavailable, match="needs about 50 MB of ram; the budget is 25 MB") as caught:
            await ask(pool, "a")
        assert caught.value.retry_after
    finally:
        await pool.close(grace_s=0)


async def test_a_smaller_variant_answers_where_the_default_has_no_room(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", hidden=256)
    names = ("f32", "q8_0")
    big = Model(id="m", source=str(source), variants=names, default="f32", backend="toy-rows", fallback=True)
    pool = pool_with(tmp_path / "cache", int(1.5 * TOY), big, toy(gguf, "other"))
    await pool.start()
    try:
        for name in names:
            job = await pool._jobs.submit(big, parse_recipe(name))
            assert (await pool._jobs.wait(job.id)).state == "done"
        await until(lambda: len(pool.states()[0].variants) == 2, 5)
        assert await ask(pool, "m") == "m:f32"
        small = asyncio.Event()
        using = asyncio.create_task(ask(pool, "m:q8_0", small))
        await until(lambda: [engine.served.id for engine in pool.engines()] == ["m:q8_0"], 20)
        assert await ask(pool, "m") == "m:q8_0"  # at once, though f32 was asked for
        pool.memory.wait_s = 0.3
        with pytest.raises(MemoryBusy):
            await ask(pool, "m:f32")  # a variant that is named is never replaced
        pool.memory.wait_s = 60.0
        small.set()
        await using
        assert await ask(pool, "m") == "m:f32"
    finally:
        await pool.close(grace_s=0)
