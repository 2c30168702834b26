"""Reservations: the budget holds, nobody busy is unloaded, and every load has its turn."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.pool import memory as module
from server.pool.learned import Learned
from server.pool.memory import Claim, Memory, NoRoom
from tests.server.pool.support import until


@dataclass
class Engine:
    """A tenant without a process: unloading takes a moment."""

    id: str
    memory: Memory
    need: int
    users: int = 0
    claim: Claim | None = None
    idle_s: float = 0.0
    reload_s: float = 1.0
    evicted: int = 0
    check: Callable[[], None] = field(default=lambda: None)
    loading: "asyncio.Future[None] | None" = None
    starting: bool = False

    @property
    def busy(self) -> bool:
        return self.users > 0 or self.starting

    def evict(self) -> None:
        assert not self.busy
        claim, self.claim = self.claim, None
        assert claim is not None
        self.evicted += 1
        asyncio.get_running_loop().call_later(0.001, claim.release)

    async def load(self, *, patient: bool = True) -> None:
        """One load at a time, however many ask."""
        if self.loading is None or self.loading.done():
            self.loading = asyncio.ensure_future(self._load(patient))
        await self.loading

    async def _load(self, patient: bool) -> None:
        if self.claim is not None:
            return
        self.starting = True
        try:
            need = {"ram": self.need}
            self.claim = await self.memory.reserve(self, need, self.reload_s, patient=patient)
            self.check()
        finally:
            self.starting = False
            self.memory.look()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)


@given(
    needs=st.lists(st.integers(10, 100), min_size=2, max_size=5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=30, deadline=None)
def test_clients_at_random_never_pass_the_budget_and_all_are_served(needs: list[int], seed: int) -> None:
    async def scenario() -> None:
        memory = Memory({"ram": 120}, wait_s=5)
        rng = random.Random(seed)

        def check() -> None:
            assert memory.held["ram"] <= 120

        engines = [Engine(str(n), memory, need, check=check) for n, need in enumerate(needs)]

        async def client() -> None:
            for _ in range(4):
                await use(rng.choice(engines), memory, rng.uniform(0, 0.002))

        async with asyncio.timeout(10):
            await asyncio.gather(*(client() for _ in range(4)))
        check()
        assert memory.waiting == 0

    asyncio.run(scenario())


async def use(engine: Engine, memory: Memory, seconds: float) -> None:
    """As a host does it: whoever has to yield takes nobody new; who holds the engine keeps it busy."""
    engine.users += 1
    while engine.claim is None or memory.yields(engine.id):
        if engine.claim is None:
            await engine.load()
            continue
        engine.users -= 1
        memory.look()
        await asyncio.wait({asyncio.ensure_future(memory.moved())}, timeout=0.05)
        engine.users += 1
    await asyncio.sleep(seconds)
    engine.users -= 1
    memory.look()


async def test_the_idle_one_goes_and_the_busy_one_stays() -> None:
    memory = Memory({"ram": 100})
    busy, idle, new = (Engine(name, memory, 50) for name in ("busy", "idle", "new"))
    await busy.load()
    await idle.load()
    busy.users = 1
    await new.load()
    assert (busy.evicted, idle.evicted) == (0, 1)
    assert memory.evictions == {"idle": 1}
    assert memory.held == {"ram": 100}


async def test_where_all_are_busy_the_cheapest_runs_out_and_takes_no_new_requests() -> None:
    memory = Memory({"ram": 100})
    dear, cheap, new = (
        Engine("dear", memory, 50, reload_s=9),
        Engine("cheap", memory, 50),
        Engine("n", memory, 40),
    )
    for engine in (dear, cheap):
        await engine.load()
        engine.users = 1
    loading = asyncio.create_task(new.load())
    await until(lambda: memory.yields("cheap"), 2)
    assert not memory.yields("dear")
    moved = asyncio.create_task(memory.moved())
    assert cheap.evicted == 0
    cheap.users = 0
    memory.look()
    await asyncio.wait_for(loading, 2)
    await asyncio.wait_for(moved, 2)
    assert (cheap.evicted, dear.evicted) == (1, 0)
    assert not memory.yields("cheap")


async def test_who_cannot_wait_or_waits_in_vain_or_never_fits_is_told() -> None:
    memory = Memory({"ram": 100}, wait_s=0.1)
    busy, new = Engine("busy", memory, 80), Engine("new", memory, 80)
    await busy.load()
    busy.users = 1
    for patient in (False, True):
        with pytest.raises(NoRoom, match="other models") as caught:
            await new.load(patient=patient)
        assert not caught.value.never
    with pytest.raises(NoRoom, match="the budget is 100") as caught:
        await Engine("huge", Memory({"ram": 100_000_000}), 10**9).load()
    assert caught.value.never
    assert (memory.waiting, memory.held, memory.yields("busy")) == (0, {"ram": 80}, False)


@pytest.mark.parametrize("ticks", range(6))
async def test_a_cancelled_load_holds_nothing(ticks: int) -> None:
    memory = Memory({"ram": 100})
    first, second = Engine("first", memory, 80), Engine("second", memory, 80)
    await first.load()
    loading = asyncio.create_task(second.load())
    for _ in range(ticks):
        await asyncio.sleep(0)
    loading.cancel()
    await asyncio.wait({loading})
    await until(lambda: memory.held["ram"] in (0, 80), 1)
    if not loading.cancelled():
        assert second.claim is not None
        second.claim.release()
    await asyncio.sleep(0.01)
    assert memory.held["ram"] == (80 if first.claim else 0)


async def test_who_grows_beyond_the_budget_makes_idle_ones_go() -> None:
    memory = Memory({"ram": 100})
    growing, idle = Engine("growing", memory, 50), Engine("idle", memory, 30)
    await growing.load()
    await idle.load()
    growing.users = 1
    assert growing.claim is not None
    memory.measured(growing.claim, {"ram": 90})
    assert idle.evicted == 1
    memory.measured(growing.claim, {"ram": 60})
    await until(lambda: memory.held == {"ram": 90}, 1)  # the most it held


def test_the_next_estimate_is_what_was_seen(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    learned = Learned(cache)
    assert learned.need("k", {"ram": 1000, "cuda:0": 7}) == {"ram": 1000, "cuda:0": 7}
    learned.add("k", {"ram": 400}, load_s=2.5)
    learned.save()
    again = Learned(cache)
    assert again.need("k", {"ram": 1000, "cuda:0": 7}) == {"ram": 424, "cuda:0": 7}
    assert again.load_s("k", 1000) == 2.5
    before = (cache / "memory.json").stat().st_mtime_ns
    again.add("k", {"ram": 401}, load_s=2.4)
    again.save()
    assert (cache / "memory.json").stat().st_mtime_ns == before  # not worth a write
    again.add("k", {"ram": 800}, load_s=2.4)
    assert again.need("k", {"ram": 0})["ram"] == 848
    (cache / "memory.json").write_bytes(b'{"engines": 7}')
    assert Learned(cache).need("k", {"ram": 1}) == {"ram": 1}
