"""The gate from end to end: real variants, real engines. What is broken is never served; names move between
variants while requests run.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quant.measure.blocks import block_errors
from quant.measure.gate import Gate
from quant.store import VariantStore
from server.catalog import Catalog, Model
from server.catalog.gates import Gates
from server.errors import Conflict, VariantRejected
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.promoting import Promoter
from server.settings import Settings
from server.types import Generate, SamplingParams
from tests.conftest import build
from tests.quant.measure.breaking import swap_scales, zero_block
from tests.server.pool.support import children

TEXT = list(range(300, 360))


@contextlib.asynccontextmanager
async def serving(cache: Path, model: Model) -> AsyncIterator[Pool]:
    """With all the time that a measurement takes."""
    before = children()
    settings = Settings(cache=cache, measure_budget_s=300.0)
    store = VariantStore(cache)
    pool = Pool(settings, Catalog((model,)), store, Jobs(settings, store))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close(grace_s=0)
        assert children() == before


def tiny(source: Path, *variants: str, gate: Gate | None = None) -> Model:
    return Model(
        id="m",
        source=str(source),
        variants=variants,
        default=variants[0],
        context=256,
        threads=1,
        gate=Gates(gate or Gate()),
    )


@pytest.mark.slow
async def test_what_is_broken_is_rejected_and_never_served(tmp_path: Path, tiny_chat: Path) -> None:
    cache = tmp_path / "cache"
    whole = build(cache, tiny_chat, "q8_0")
    async with serving(cache, tiny(tiny_chat, "q8_0")) as pool, pool.acquire("m", wait_s=None) as lease:
        assert lease.variant.label in ("passed", "degraded")
    f32 = build(cache, tiny_chat, "f32")
    zero_block(whole, 5)
    errors = block_errors(f32, whole, TEXT, 1)
    assert max(errors, key=lambda one: one.added).block == 5
    async with serving(cache, tiny(tiny_chat, "q8_0")) as pool:  # the old measurement is of other files
        for _ in range(2):
            with pytest.raises(VariantRejected, match="max_times_band"):
                async with pool.acquire("m:q8_0", wait_s=None):
                    pass
        with pytest.raises(VariantRejected):
            await Promoter(pool, pool._jobs).promote(tiny(tiny_chat, "q4_k_m", "q8_0"), "q8_0")
        assert pool.engines() == []
        known = pool.gatekeeper.known("m:q8_0")
        assert known is not None
        assert known.verdict.state == "rejected"
        assert "rejects" in pool.choice(pool.catalog.models[0], "auto").reasons["q8_0"]
    async with serving(cache, tiny(tiny_chat, "q8_0", gate=Gate(serve_anyway=True))) as pool:
        async with pool.acquire("m", wait_s=None) as lease:
            assert lease.variant.label == "rejected"
        assert "served anyway" in (pool.gatekeeper.notice("m:q8_0") or "")


@pytest.mark.slow
async def test_swapped_scales_are_rejected(tmp_path: Path, tiny_chat: Path) -> None:
    cache = tmp_path / "cache"
    swap_scales(build(cache, tiny_chat, "q8_0"), "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    async with serving(cache, tiny(tiny_chat, "q8_0")) as pool:
        with pytest.raises(VariantRejected):
            async with pool.acquire("m", wait_s=None):
                pass


async def stream(pool: Pool, number: int, done: list[tuple[str, int]], stopping: asyncio.Event) -> None:
    """One request after another; which variant answered, and with how many tokens."""
    params = SamplingParams(max_tokens=12, temperature=0.0, reproducible=False)
    for count in itertools.count():
        if stopping.is_set():
            return
        async with pool.acquire("m", wait_s=None) as lease:
            request = Generate(id=f"{number}-{count}", prompt=(1, 2, 3), params=params)
            tokens = [token async for event in lease.engine.generate(request) for token in event.tokens]
            done.append((lease.variant.recipe, len(tokens)))


async def more(done: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """What came after the next 16, which may have begun before."""
    start = len(done)
    while len(done) < start + 16 + count:
        await asyncio.sleep(0.01)
    return done[start + 16 :]


@pytest.mark.slow
async def test_names_move_under_load_and_back_and_over_a_restart(tmp_path: Path, tiny_chat: Path) -> None:
    """16 streams all the while: none fails, none is cut."""
    cache = tmp_path / "cache"
    model = tiny(tiny_chat, "q8_0", "q6_k")
    async with serving(cache, model) as pool:
        async with pool.acquire("m", wait_s=None):
            pass
        done: list[tuple[str, int]] = []
        stopping = asyncio.Event()
        streams = [asyncio.create_task(stream(pool, number, done, stopping)) for number in range(16)]
        await Promoter(pool, pool._jobs).promote(model, "q6_k")
        assert {name for name, _ in await more(done, 16)} == {"q6_k"}
        with pytest.raises(Conflict):
            await Promoter(pool, pool._jobs).promote(model, "q6_k")
        await Promoter(pool, pool._jobs).roll_back(model)
        assert {name for name, _ in await more(done, 16)} == {"q8_0"}
        stopping.set()
        await asyncio.gather(*streams)
        assert {count for _, count in done} == {12}
        await Promoter(pool, pool._jobs).promote(model, "q6_k")
    async with serving(cache, model) as pool:
        assert pool.default(model) == "q6_k"
        with pytest.raises(Conflict):
            await Promoter(pool, pool._jobs).promote(model, "q6_k")
