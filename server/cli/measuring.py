"""One variant for `quantserve measure`: built in one child process, measured in another."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from quant.measure.measurement import read_measurement
from quant.recipe import Recipe
from quant.store import Variant, VariantStore
from server.backends import registry
from server.catalog import Model
from server.catalog.source import Reference, read_reference
from server.cli.building import Interrupted, run_builder
from server.cli.running import run_module
from server.cli.terminal import Progress, stop
from server.errors import ServerError
from server.pool.opening import own_context, served_context
from server.process.orders import MeasureOrder
from server.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    corpus: str | None = None
    texts: int | None = None
    budget_s: float | None = None
    again: bool = False
    context: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    model: Model
    recipe: Recipe

    @property
    def id(self) -> str:
        return f"{self.model.id}:{self.recipe.name}"


def run(settings: Settings, job: Job, wanted: Wanted, shown: Progress) -> str | None:
    """None, or why it could not be built or measured."""
    store = VariantStore(settings.cache)
    model = job.model
    try:
        answer = run_builder(
            settings,
            _reference(model),
            job.recipe,
            partial(shown.show, job.id),
            say=lambda note: shown.say(f"{job.id}: {note}"),
        )
    except Interrupted:
        stop("interrupted; the same command goes on", code=130)
    if answer.error or not answer.key:
        return answer.error.message if answer.error else "the builder gave no answer"
    with store.use(answer.key) as variant:
        if read_measurement(variant.path, variant.manifest) and not wanted.again:
            return None
        try:
            order = order_of(settings, model, variant, wanted)
        except ServerError as error:
            return str(error)
        return _measured(order, job.id, shown)


def order_of(settings: Settings, model: Model, variant: Variant, wanted: Wanted) -> MeasureOrder:
    """The variant opened as the server would. Raises RequestError where nothing here can open it."""
    manifest = variant.manifest
    backend = registry.for_format(manifest.format).name if model.backend == "auto" else model.backend
    return MeasureOrder(
        cache=str(settings.cache),
        source=model.source,
        revision=model.revision,
        key=variant.key,
        backend=backend,
        context=served_context(
            wanted.context or model.context, own_context(variant.path), settings.default_context
        ),
        parallel=model.parallel,
        threads=wanted.threads or model.threads,
        corpus=wanted.corpus,
        texts=wanted.texts,
        budget_s=wanted.budget_s,
    )


def _measured(order: MeasureOrder, id: str, shown: Progress) -> str | None:
    answer = run_module(
        "server.process.measurer",
        ("--order", msgspec.json.encode(order).decode()),
        partial(shown.show, id),
        say=shown.say,
        interrupted="interrupted; what is measured stays",
    )
    if isinstance(answer, str):
        return answer
    return answer.error.message if answer.error else None


def _reference(model: Model) -> Reference:
    found = read_reference(model.source, Path.cwd())
    return replace(found, revision=model.revision) if model.revision else found
