"""Structured output and the like make an engine larger: there is memory for that before it happens."""

import asyncio
from pathlib import Path

import pytest

from server.errors import MemoryBusy, ModelUnavailable
from server.pool import loader, memory, room
from server.pool import pool as pool_module
from server.pool.estimate import ENGINE
from server.pool.pool import Pool
from server.pool.uses import MIB, Use, extras
from tests.server.pool.support import answer, children, toy, until, write_gguf
from tests.server.pool.test_budget import pool_with

TOY = ENGINE["toy-rows"]
GRAMMAR: frozenset[Use] = frozenset(("grammar",))
SCORES: frozenset[Use] = frozenset(("scores",))


@pytest.fixture(autouse=True)
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy engine holds no more for a grammar; here it is said to."""
    monkeypatch.setattr(pool_module, "MEASURE_S", 3600.0)
    monkeypatch.setattr(memory, "PATIENCE_S", 0.2)
    monkeypatch.setattr(room, "PATIENCE_S", 0.2)
    monkeypatch.setattr(loader, "extras", lambda *_: {"grammar": TOY // 2, "scores": TOY // 2})


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "toy.gguf")


async def ask(
    pool: Pool, name: str, uses: frozenset[Use] = frozenset(), hold: asyncio.Event | None = None
) -> int:
    """The process that answered."""
    async with pool.acquire(name, wait_s=60, uses=uses) as lease:
        assert uses <= lease.uses
        assert pool.memory.held["ram"] <= pool.memory.budgets["ram"]
        if hold is not None:
            await hold.wait()
        assert len(await answer(lease, id=f"{name}-{id(lease)}")) == 8
        return lease.engine.pid


async def test_an_engine_grows_where_there_is_room(tmp_path: Path, gguf: Path) -> None:
    pool = pool_with(tmp_path / "cache", 2 * TOY, toy(gguf, "a"))
    await pool.start()
    try:
        first = await ask(pool, "a")
        assert pool.memory.held["ram"] == TOY
        assert await ask(pool, "a", GRAMMAR) == first
        assert pool.memory.held["ram"] == TOY + TOY // 2
        assert await ask(pool, "a", GRAMMAR) == first
        assert pool.memory.held["ram"] == TOY + TOY // 2
    finally:
        await pool.close(grace_s=0)
    assert children() == []
    assert pool.memory.held["ram"] == 0


async def test_an_idle_engine_goes_for_another_that_grows(tmp_path: Path, gguf: Path) -> None:
    pool = pool_with(tmp_path / "cache", int(2.2 * TOY), toy(gguf, "a"), toy(gguf, "b"))
    await pool.start()
    try:
        first = await ask(pool, "a")
        await ask(pool, "b")
        assert await ask(pool, "a", GRAMMAR) == first
        assert pool.memory.evictions == {"b:q4_0": 1}
    finally:
        await pool.close(grace_s=0)


async def test_where_others_are_busy_the_engine_itself_is_loaded_again(tmp_path: Path, gguf: Path) -> None:
    pool = pool_with(tmp_path / "cache", int(2.2 * TOY), toy(gguf, "a"), toy(gguf, "b"))
    await pool.start()
    try:
        first, hold = await ask(pool, "a"), asyncio.Event()
        using = asyncio.create_task(ask(pool, "b", hold=hold))
        await until(lambda: len(pool.engines()) == 2, 20)
        asking = [asyncio.create_task(ask(pool, "a", GRAMMAR)) for _ in range(3)]
        await until(lambda: pool.memory.yields("b:q4_0"), 20)
        hold.set()
        assert await using
        again = set(await asyncio.gather(*asking))
        assert len(again) == 1
        assert first not in again
        assert await ask(pool, "b")
    finally:
        await pool.close(grace_s=0)
    assert children() == []


async def test_who_waits_in_vain_is_told_to_come_back(tmp_path: Path, gguf: Path) -> None:
    pool = pool_with(tmp_path / "cache", int(2.2 * TOY), toy(gguf, "a"), toy(gguf, "b"))
    pool.memory.wait_s = 1.0
    await pool.start()
    try:
        hold = asyncio.Event()
        using = [asyncio.create_task(ask(pool, name, hold=hold)) for name in ("a", "b")]
        await until(lambda: len(pool.engines()) == 2, 20)
        with pytest.raises(MemoryBusy) as caught:
            await ask(pool, "a", GRAMMAR)
        assert caught.value.retry_after
        plain = asyncio.create_task(ask(pool, "a"))  # is not held up by who has given up
        assert await asyncio.wait_for(plain, 5)
        hold.set()
        await asyncio.gather(*using)
    finally:
        await pool.close(grace_s=0)


async def test_what_never_fits_is_refused_and_hinders_nobody(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_with(tmp_path / "cache", int(1.2 * TOY), toy(gguf, "a"))
    await pool.start()
    try:
        for _ in range(2):
            with pytest.raises(ModelUnavailable, match="this kind of request"):
                await ask(pool, "a", GRAMMAR)
            assert await ask(pool, "a")
    finally:
        await pool.close(grace_s=0)


async def test_uses_that_do_not_fit_together_take_turns(tmp_path: Path, gguf: Path) -> None:
    pool = pool_with(tmp_path / "cache", int(1.7 * TOY), toy(gguf, "a"))
    await pool.start()
    try:
        for uses in (GRAMMAR, SCORES, GRAMMAR, SCORES):
            assert await ask(pool, "a", uses)
        together = [asyncio.create_task(ask(pool, "a", uses)) for uses in (GRAMMAR, SCORES) * 4]
        assert all(await asyncio.gather(*together))
    finally:
        await pool.close(grace_s=0)


def test_what_uses_take_grows_with_the_vocabulary() -> None:
    small, large = extras("llama", 16_384), extras("llama", 151_936)
    assert 50 * MIB < small["grammar"] < large["grammar"] < 100 * MIB
    assert small["scores"] < large["scores"] == 128 * MIB
    assert extras("torch", 16_384).keys() == {"grammar"}


async def test_room_that_was_not_used_is_not_taken_for_what_the_use_takes(tmp_path: Path, gguf: Path) -> None:
    """An engine that had it and was not asked so held little, and says nothing of the next one."""
    pool = pool_with(tmp_path / "cache", 3 * TOY, toy(gguf, "a"))
    await pool.start()
    try:
        await ask(pool, "a", GRAMMAR)
        (loaded,) = [host.loaded for host in pool._hosts.values()]
        assert loaded is not None
        pool._learned.add(loaded.learned_as, {"ram": TOY // 2}, 1.0)
        pool._hosts["a:q4_0"].evict()
        await ask(pool, "a", GRAMMAR)
        assert pool.memory.held["ram"] == TOY + TOY // 2
    finally:
        await pool.close(grace_s=0)
