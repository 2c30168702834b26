"""What can be known of a build before it is queued: that it is built already, or that it cannot succeed."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from quant.build_plan import BuildPlan, plan_build
from quant.errors import BadRecipe, BadSource
from quant.errors import DiskFull as NoRoom
from quant.plan import require_buildable, require_room, variant_key
from quant.recipe import Recipe
from quant.source import Source
from quant.store import VariantStore
from server.catalog import Model
from server.errors import DiskFull, RequestError
from server.pool.background import in_thread
from server.pool.sources import Sources, is_hub
from server.process.memory import build_memory

PREFLIGHT_S = 5.0  # for reading the source before a job is accepted; hashing a large one takes longer


class Checked(NamedTuple):
    key: str | None = None  # of the variant; None where the source is not known yet
    found: bool = False  # it is built already


async def preflight(
    sources: Sources, store: VariantStore, model: Model, recipe: Recipe, *, again: bool = False
) -> Checked:
    """`again`: a variant that is built already proves nothing.

    Raises RequestError, DiskFull for a build that cannot succeed.
    """
    try:
        async with asyncio.timeout(PREFLIGHT_S):
            source = await sources.open(model)
            return await in_thread(partial(_check, store, source, recipe, again))
    except TimeoutError:
        return Checked()  # the builder will know
    except BadRecipe as error:
        raise RequestError(str(error), param="recipe") from error
    except BadSource as error:
        if is_hub(model):  # not pulled yet: that is a part of the job
            return Checked()
        raise RequestError(f"the source of {model.id} cannot be used: {error}", param="model") from error
    except NoRoom as error:
        raise DiskFull(str(error)) from error


def _check(store: VariantStore, source: Source, recipe: Recipe, again: bool) -> Checked:
    """Raises BadRecipe, BadSource, DiskFull (of quant)."""
    key = variant_key(source, recipe)
    if not again and store.find(key) is not None:
        return Checked(key, found=True)
    require_buildable(source, recipe)
    require_room(source, recipe, store)
    with suppress(BadSource):  # the builder says better what is wrong with a checkpoint
        _require_memory(plan_build(source, recipe))
    return Checked(key)


def _require_memory(plan: BuildPlan) -> None:
    """Raises BadRecipe."""
    allowed = build_memory()
    if plan.device == "cpu" and plan.memory_bytes > allowed:
        raise BadRecipe(
            f"the build needs about {plan.memory_bytes:,} bytes of memory, but a build may use {allowed:,}"
        )
