"""Mixtures as files that exist for as long as they are scored."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from quant.errors import BuildFailed
from quant.gguf.kquant import quantize
from quant.recipe import GgufRecipe, Recipe, TorchRecipe
from quant.search.gguf_space import gguf_alone
from quant.search.shelf import PROBE, PROBES
from quant.search.space import Space
from quant.search.torch_space import rounded_to_nearest, torch_alone
from quant.store import Variant, VariantStore
from server.pool.builds import Order, run_child
from server.process.reports import BuildReport


class Quiet:
    """The watch of a child whose own progress nobody sees."""

    def report(self, report: BuildReport) -> None: ...

    def said(self, lines: object) -> None: ...


@asynccontextmanager
async def gguf_probe(
    types: Mapping[str, str], space: Space, base: Path, folder: Path, threads: int | None
) -> AsyncIterator[Path]:
    """`base`, a float GGUF file, as the mixture; one group alone with everything else in 16 bits."""
    whole = len(types) == len(space.groups)
    recipe = space.recipe(types) if whole else gguf_alone(*next(iter(types.items())), space.groups)
    assert isinstance(recipe, GgufRecipe)
    target = folder / PROBE
    try:
        await asyncio.to_thread(partial(quantize, base, target, recipe, progress=_ignore, threads=threads))
        yield target
    finally:
        target.unlink(missing_ok=True)


@asynccontextmanager
async def torch_probe(
    types: Mapping[str, str], space: Space, source: Path, folder: Path
) -> AsyncIterator[Path]:
    """`source`, a checkpoint, as the mixture, rounded to nearest. Raises BuildFailed."""
    whole = len(types) == len(space.groups)
    recipe = space.recipe(types) if whole else torch_alone(*next(iter(types.items())), space)
    assert isinstance(recipe, TorchRecipe)
    cache = folder / PROBES
    try:
        store = VariantStore(cache)
        found = await built(store, str(source), None, rounded_to_nearest(recipe), folder / "child.progress")
        yield found.path
    finally:
        for name in ("variants", "scratch"):
            shutil.rmtree(cache / name, ignore_errors=True)


async def built(
    store: VariantStore, source: str, revision: str | None, recipe: Recipe | str, progress: Path
) -> Variant:
    """The variant, from a child process that builds it or finds it. Raises BuildFailed."""
    options = {
        "--cache": store.cache,
        "--source": source,
        "--revision": revision,
        "--recipe": json.dumps(recipe if isinstance(recipe, str) else recipe.spec),
        "--local-only": 1,
        "--cache-max-bytes": store.max_bytes,
    }
    answer = await run_child(Order(options=options, progress=progress), Quiet())
    variant = store.find(answer.key) if answer.key else None
    if answer.error or variant is None:
        raise BuildFailed(answer.error.message if answer.error else "a variant that was built is gone")
    return variant


def _ignore(_done: int, _total: int) -> None:
    return
