"""Small real things to serve: a GGUF file that only the toy backend opens, and a pool around it."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from gguf import GGUFWriter

from quant.store import VariantStore
from server.catalog import Catalog, Model
from server.pool.jobs import Jobs
from server.pool.pool import Lease, Pool
from server.settings import Settings
from server.types import Generate, SamplingParams

Q4_0 = 2  # llama.cpp's number of the file type


def write_gguf(path: Path, context: int = 2048) -> Path:
    """Metadata and one tensor: sound to the header reader."""
    import numpy as np

    writer = GGUFWriter(path, "llama")
    writer.add_file_type(Q4_0)
    writer.add_context_length(context)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def toy(path: Path, id: str = "toy", **fields: object) -> Model:
    return Model(
        **{"id": id, "source": str(path), "variants": (), "default": "q4_0", "backend": "toy-rows", **fields}  # type: ignore[arg-type]
    )


def pool_of(cache: Path, *models: Model) -> Pool:
    settings = Settings(cache=cache, measure_budget_s=0.0)
    store = VariantStore(cache)
    return Pool(settings, Catalog(models), store, Jobs(settings, store))


@contextlib.asynccontextmanager
async def running(cache: Path, *models: Model) -> AsyncIterator[Pool]:
    """A pool that has started; after it no process is left."""
    before = children()
    pool = pool_of(cache, *models)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close(grace_s=0)
        assert children() == before


async def answer(lease: Lease, max_tokens: int = 8, id: str = "a") -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    tokens: list[int] = []
    async for event in lease.engine.generate(Generate(id=id, prompt=(1, 2, 3), params=params)):
        tokens += event.tokens
    return tokens


def children() -> list[str]:
    """Zombies included."""
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


async def until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        await asyncio.sleep(0.01)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
