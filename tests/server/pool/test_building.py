"""The first load of a variant that is not there: built through a job, kept, found again, mended."""

import asyncio
from pathlib import Path

import pytest

from quant.recipe import parse_recipe
from quant.store import VariantStore
from server.catalog import Model
from server.errors import ModelLoading, ModelUnavailable, UnknownModel
from server.pool import policy
from server.pool.pool import Pool
from tests.quant.checkpoints import write_checkpoint
from tests.server.pool.support import answer, files, running, until


def toy_on(source: Path) -> Model:
    """A checkpoint that is really built, opened by the toy."""
    return Model(id="m", source=str(source), variants=("f16",), default="f16", backend="toy-rows")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return toy_on(write_checkpoint(tmp_path / "source"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


async def served(pool: Pool, name: str) -> str:
    async with pool.acquire(name, wait_s=60) as lease:
        assert len(await answer(lease)) == 8
        return lease.variant.id


async def test_first_load_builds_and_the_second_start_adds_no_file(cache: Path, model: Model) -> None:
    async with running(cache, model) as pool:
        first = asyncio.create_task(served(pool, "m"))
        await until(lambda: pool.states()[0].state == "building", 20)
        with pytest.raises(ModelLoading) as caught:
            await pool.acquire("m", wait_s=0).__aenter__()
        job = pool.states()[0].job
        assert job is not None
        assert job in str(caught.value)
        assert caught.value.retry_after == policy.BUILDING_RETRY_S
        assert await first == "m:f16"
        await until(lambda: pool.states()[0].variants == ("m:f16",), 5)
        assert pool._jobs.get(job).outcome == "built"
    before = files(cache)
    async with running(cache, model) as pool:
        await until(lambda: pool.states()[0].variants == ("m:f16",), 5)  # without a request
        assert await served(pool, "m:f16") == "m:f16"
    assert files(cache) == before


async def test_a_variant_built_by_a_job_is_found_by_its_name_and_no_other_is(
    cache: Path, model: Model
) -> None:
    custom = parse_recipe({"type": "q8_0", "overrides": [["attn_v", "f16"]]})
    async with running(cache, model) as pool:
        for name in ("m:bf16", f"m:{custom.name}"):
            with pytest.raises(UnknownModel):
                await served(pool, name)
        jobs = pool._jobs
        for recipe in (parse_recipe("bf16"), custom):
            assert (await jobs.wait((await jobs.submit(model, recipe)).id)).outcome == "built"
        for name in ("m:bf16", f"m:{custom.name}"):
            assert await served(pool, name) == name
        with pytest.raises(UnknownModel):
            await served(pool, "m:q6_k")


async def test_cancelling_the_job_tells_those_who_wait_for_it(cache: Path, tiny_chat: Path) -> None:
    model = toy_on(tiny_chat)  # large enough to be caught at work
    async with running(cache, model) as pool:
        waiting = [asyncio.create_task(served(pool, "m")) for _ in range(3)]
        await until(lambda: pool.states()[0].progress is not None and pool.states()[0].job is not None, 20)
        job = pool.states()[0].job
        assert job is not None
        await pool._jobs.cancel(job)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ModelUnavailable] * 3
        assert "was cancelled" in str(outcomes[0])
        assert job in str(outcomes[0])
        assert pool.states()[0].state == "failed"


async def test_a_damaged_variant_is_never_served_but_built_anew(
    cache: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(cache, model) as pool:
        await served(pool, "m")
    (variant,) = VariantStore(cache).list()
    weights = variant.path / "model.gguf"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    async with running(cache, model) as pool:
        assert await served(pool, "m") == "m:f16"
        assert weights.read_bytes() == original
        assert [job.outcome for job in pool._jobs.list()] == ["built", "built"]
    kept = cache / "quarantine" / variant.key / "model.gguf"
    assert kept.read_bytes() == original[:-1] + bytes([original[-1] ^ 1])
    assert "it is put into quarantine and built anew" in caplog.text


async def test_what_is_no_whole_variant_goes_into_quarantine_too(
    cache: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(cache, model) as pool:
        await served(pool, "m")
    (variant,) = VariantStore(cache).list()
    (variant.path / "manifest.json").write_text("{")
    async with running(cache, model) as pool:
        assert await served(pool, "m") == "m:f16"
    assert (cache / "quarantine" / variant.key / "manifest.json").read_text() == "{"
    assert "it is put into quarantine and built anew" in caplog.text


async def test_a_variant_in_use_cannot_be_deleted_and_one_unloaded_can(cache: Path, model: Model) -> None:
    from quant.errors import VariantInUse

    store = VariantStore(cache)
    async with running(cache, model) as pool:
        await served(pool, "m")
        (variant,) = store.list()
        with pytest.raises(VariantInUse):
            store.delete(variant.key)
    store.delete(variant.key)
    assert store.list() == []


@pytest.mark.slow
async def test_the_real_backend_speaks(cache: Path, tiny_chat: Path) -> None:
    """From bf16 weights to English, through q4_k_m and llama.cpp."""
    from server.types import Generate, SamplingParams

    model = Model(id="tiny-chat", source=str(tiny_chat), threads=1, preload=True)
    async with running(cache, model) as pool, pool.acquire("tiny-chat", wait_s=120) as lease:
        prompt = await lease.text.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
        params = SamplingParams(max_tokens=24, temperature=0.0, stop_ids=tuple(lease.text.end_ids))
        tokens: list[int] = []
        async for event in lease.engine.generate(Generate(id="a", prompt=tuple(prompt), params=params)):
            tokens += event.tokens
        text = b"".join(lease.text.pieces[token] for token in tokens).decode()
        assert "Paris" in text
        assert lease.variant.backend == "llama"
        assert lease.engine.ready.limits.context == 1024  # the model's own, less than the default
