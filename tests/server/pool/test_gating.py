"""The gate from end to end: real variants, real engines. What is broken is never served; names move between
variants while requests run.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from quant.manifest import read_manifest
from quant.measure.blocks import block_errors
from quant.measure.gate import Gate
from quant.measure.measurement import MEASUREMENT, files_digest, write_measurement
from quant.store import VariantStore
from server.catalog import Catalog, Model
from server.catalog.gates import Gates
from server.errors import Conflict, VariantRejected
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.promoting import Promoter
from server.process.client import EngineClient
from server.settings import Settings
from server.types import Generate, Open, SamplingParams
from tests.conftest import build
from tests.quant.measure.breaking import change_file, swap_scales, swap_tokens, zero_block
from tests.quant.measure.measurements import measurement
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source says is computed once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
async def test_what_is_broken_is_rejected_and_never_served(cache: Path, tiny_chat: Path) -> None:
    model = tiny(tiny_chat, "q8_0")
    folder = build(cache, tiny_chat, "q8_0")
    whole = (folder / "model.gguf").read_bytes()
    async with serving(cache, model) as pool, pool.acquire("m", wait_s=None) as lease:
        assert lease.variant.label in ("passed", "degraded")
    zero_block(folder, 5)
    errors = block_errors(build(cache, tiny_chat, "f32"), folder, TEXT, 1)
    assert max(errors, key=lambda one: one.added).block == 5
    await require_rejected(cache, model)  # the old measurement is of other files
    async with serving(cache, tiny(tiny_chat, "q8_0", gate=Gate(serve_anyway=True))) as pool:
        async with pool.acquire("m", wait_s=None) as lease:
            assert lease.variant.label == "rejected"
        assert "served anyway" in (pool.gatekeeper.notice("m:q8_0") or "")
    (folder / "model.gguf").write_bytes(whole)
    swap_scales(folder, "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    await require_rejected(cache, model)


@pytest.mark.slow
async def test_four_bits_that_are_broken_are_rejected_too(cache: Path, tiny_chat: Path) -> None:
    """Their divergence alone could be that of a bad variant."""
    model = tiny(tiny_chat, "q4_k_m")
    folder = build(cache, tiny_chat, "q4_k_m")
    whole = (folder / "model.gguf").read_bytes()
    async with serving(cache, model) as pool, pool.acquire("m", wait_s=None) as lease:
        assert lease.variant.label in ("passed", "degraded")
    for harm in (
        partial(swap_scales, one="blk.3.attn_k.weight", other="blk.9.attn_k.weight"),
        partial(zero_block, block=7),
    ):
        harm(folder)
        await require_rejected(cache, model, "max_times_rounding")
        (folder / "model.gguf").write_bytes(whole)


async def test_a_measurement_that_ends_while_the_engine_opens_counts(
    cache: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came too late for the gate's own wait, and before the first answer."""
    model, folder = tiny(tiny_chat, "q5_k_m"), build(cache, tiny_chat, "q5_k_m")
    start = EngineClient.start

    async def slowly(spec: Open, **options: Any) -> EngineClient:
        digest = files_digest(read_manifest(folder))
        write_measurement(folder, measurement(9.0, files=digest, variant="q5_k_m"))
        return await start(spec, **options)

    monkeypatch.setattr(EngineClient, "start", slowly)
    settings = Settings(cache=cache, measure_budget_s=0.0)
    store = VariantStore(cache)
    pool = Pool(settings, Catalog((model,)), store, Jobs(settings, store))
    await pool.start()
    try:
        with pytest.raises(VariantRejected, match="max_kl"):
            async with pool.acquire("m", wait_s=None):
                pass
    finally:
        await pool.close(grace_s=0)
        (folder / MEASUREMENT).unlink()  # other tests share the cache


@pytest.mark.slow
async def test_a_variant_with_another_tokenizer_is_rejected(cache: Path, tiny_chat: Path) -> None:
    """Every answer would be garbage, and no divergence shows it: tokens are asked for by number."""
    model = tiny(tiny_chat, "q4_0")
    folder = build(cache, tiny_chat, "q4_0")
    change_file(folder, "tokenizer.json", swap_tokens)
    await require_rejected(cache, model, r"not the source's: tokenizer\.json")


async def require_rejected(cache: Path, model: Model, why: str = "max_times_band") -> None:
    async with serving(cache, model) as pool:
        for _ in range(2):
            with pytest.raises(VariantRejected, match=why):
                async with pool.acquire(f"m:{model.default}", wait_s=None):
                    pass
        assert pool.engines() == []
        assert "rejects" in pool.choice(model, "auto").reasons[model.default]


class Answer(NamedTuple):
    asked: float  # by a monotonic clock
    variant: str
    tokens: int


async def stream(pool: Pool, number: int, done: list[Answer], stopping: asyncio.Event) -> None:
    """One request after another."""
    params = SamplingParams(max_tokens=12, temperature=0.0, reproducible=False)
    for count in itertools.count():
        if stopping.is_set():
            return
        asked = time.monotonic()
        async with pool.acquire("m", wait_s=None) as lease:
            request = Generate(id=f"{number}-{count}", prompt=(1, 2, 3), params=params)
            tokens = [token async for event in lease.engine.generate(request) for token in event.tokens]
            done.append(Answer(asked, lease.variant.recipe, len(tokens)))


async def asked_from_now_on(done: list[Answer]) -> set[str]:
    """Who answers what is asked later than now: 32 requests."""
    now = time.monotonic()
    while len(found := [answer for answer in done if answer.asked > now]) < 32:
        await asyncio.sleep(0.01)
    return {answer.variant for answer in found}


@pytest.mark.slow
async def test_names_move_under_load_and_back_and_over_a_restart(cache: Path, tiny_chat: Path) -> None:
    """16 streams all the while: none fails, none is cut."""
    model = tiny(tiny_chat, "q5_k_m", "q6_k")
    async with serving(cache, model) as pool:
        async with pool.acquire("m", wait_s=None):
            pass
        done: list[Answer] = []
        stopping = asyncio.Event()
        streams = [asyncio.create_task(stream(pool, number, done, stopping)) for number in range(16)]
        await Promoter(pool, pool._jobs).promote(model, "q6_k")
        assert await asked_from_now_on(done) == {"q6_k"}
        with pytest.raises(Conflict):
            await Promoter(pool, pool._jobs).promote(model, "q6_k")
        await Promoter(pool, pool._jobs).roll_back(model)
        assert await asked_from_now_on(done) == {"q5_k_m"}
        stopping.set()
        await asyncio.gather(*streams)
        assert {answer.tokens for answer in done} == {12}
        await Promoter(pool, pool._jobs).promote(model, "q6_k")
    async with serving(cache, model) as pool:
        assert pool.default(model) == "q6_k"
        with pytest.raises(Conflict):
            await Promoter(pool, pool._jobs).promote(model, "q6_k")
