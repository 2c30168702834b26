"""Models by name: each request borrows the engine of the variant that it names."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine

from quant.errors import QuantError
from quant.store import Variant, VariantStore
from server.catalog import Catalog, Model
from server.errors import ShuttingDown, UnknownModel
from server.pool.background import in_thread
from server.pool.host import VariantHost
from server.pool.jobs import Jobs
from server.pool.loader import Loader
from server.pool.records import Job
from server.pool.select import built_of, is_listed, may_be_a_variant, variant_id
from server.pool.states import EngineState, Lease, ModelState, Served
from server.settings import Settings

__all__ = ["EngineState", "Lease", "ModelState", "Pool", "Served"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05


class Pool:
    def __init__(self, settings: Settings, catalog: Catalog, store: VariantStore, jobs: Jobs) -> None:
        self.catalog = catalog
        self._store = store
        self._jobs = jobs
        self._loader = Loader(settings, store, jobs)
        self._hosts: dict[str, VariantHost] = {}  # by variant id
        self._built: dict[str, frozenset[str]] = {}  # ids of built variants, by model id
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        jobs.listeners.append(self._job_finished)

    async def start(self) -> None:
        """Returns at once: models with `preload` load in the background."""
        await self._jobs.start()
        self._spawn(self._find_built())
        for model in self.catalog.models:
            if model.preload:
                self._spawn(self._preload(model))

    def drain(self) -> None:
        """From now on `acquire` raises ShuttingDown; what runs goes on."""
        self._draining = True

    async def close(self, grace_s: float = 30.0) -> None:
        """Drain, wait at most `grace_s` for leases to end, then end every engine and build."""
        self.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(host.loaded and host.users for host in self._hosts.values()):
                    await asyncio.sleep(DRAIN_POLL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            self._jobs.close(),
            *(host.close() for host in self._hosts.values()),
            *self._tasks,
            return_exceptions=True,
        )

    @contextlib.asynccontextmanager
    async def acquire(self, name: str, *, wait_s: float | None) -> AsyncIterator[Lease]:
        """Borrow the engine of "model" or "model:variant", which is built and loaded first if need be.

        `wait_s` None: for as long as that takes. Raises UnknownModel, ModelLoading, ModelUnavailable,
        ShuttingDown.
        """
        model, variant = self.catalog.resolve(name)
        if self._draining:
            raise ShuttingDown("the server is shutting down", retry_after=1)
        host = await self._host(model, variant or model.default)
        loaded = await host.acquire(wait_s)
        try:
            yield Lease(model=model, variant=loaded.served, engine=loaded.engine, text=loaded.text)
        finally:
            host.release()

    def states(self) -> list[ModelState]:
        """One for each model of the catalog, in its order."""
        return [self.state(model) for model in self.catalog.models]

    def state(self, model: Model, name: str | None = None) -> ModelState:
        """Of the variant called `name`, or of the default. Raises UnknownModel for one that is not there."""
        id, built = variant_id(model, name or model.default), self._variants(model)
        if name and not is_listed(model, name) and id not in built:
            raise self._no_such_variant(model)
        return self._state(model, id, built)

    def engines(self) -> list[EngineState]:
        """One for each loaded engine, of any variant."""
        return [
            EngineState(
                served=loaded.served,
                status=loaded.engine.status,
                users=host.users,
                restarts=host.restarts,
                pid=loaded.engine.pid,
            )
            for host in self._hosts.values()
            if (loaded := host.loaded) is not None
        ]

    def _no_such_variant(self, model: Model) -> UnknownModel:
        there = {
            *self._variants(model),
            *(variant_id(model, name) for name in (model.default, *model.variants)),
        }
        return UnknownModel(
            f"{model.id} has no such variant; there is {', '.join(sorted(there))}", param="model"
        )

    def _state(self, model: Model, id: str, built: tuple[str, ...]) -> ModelState:
        host = self._hosts.get(id)
        if host is None:
            return ModelState(model=model, variant=id, state="unloaded", variants=built)
        loaded = host.loaded
        job = host.watch.job if host.state == "building" else None
        return ModelState(
            model=model,
            variant=id,
            state=host.state,
            job=job,
            progress=self._jobs.get(job).progress if job else host.watch.progress,
            error=host.error,
            status=loaded.engine.status if loaded else None,
            served=loaded.served if loaded else None,
            template=loaded.text.template_origin if loaded else None,
            variants=built,
        )

    def _variants(self, model: Model) -> tuple[str, ...]:
        """Ids of all that can be served without a build."""
        own = {variant_id(model, model.default)} if model.is_ready else set()
        loaded = {host.id for host in self._hosts.values() if host.model.id == model.id and host.loaded}
        return tuple(sorted({*own, *loaded, *self._built.get(model.id, ())}))

    async def _host(self, model: Model, name: str) -> VariantHost:
        """Raises UnknownModel for a variant that is neither listed in models.yaml nor built."""
        id = variant_id(model, name)
        if (host := self._hosts.get(id)) is not None:
            return host
        if not is_listed(model, name) and not await self._is_built(model, name):
            raise self._no_such_variant(model)
        return self._hosts.setdefault(id, VariantHost(model, name, self._loader))

    async def _is_built(self, model: Model, name: str) -> bool:
        return may_be_a_variant(model, name) and await self._loader.find(model, name) is not None

    async def _preload(self, model: Model) -> None:
        """Until it is loaded, or until trying again is useless. A later request tries again in any case."""
        host = await self._host(model, model.default)
        while True:
            await asyncio.wait({host.load()})
            refused = host.refusal()
            if host.loaded is not None or host.lasting or refused is None:
                return
            await asyncio.sleep(refused.retry_s)

    async def _find_built(self) -> None:
        """Fill the list of built variants, of models whose source some variant names."""
        variants = await in_thread(self._store.list)
        named = {variant.manifest.source.id for variant in variants}
        for model in self.catalog.models:
            if model.source in named:
                with contextlib.suppress(QuantError, OSError):
                    await self._jobs.sources.open(model)
        self._index(variants)

    def _index(self, variants: list[Variant]) -> None:
        for model in self.catalog.models:
            source = self._jobs.sources.known(model)
            if source is None:
                continue
            names = {variant.manifest.recipe.name for variant in built_of(variants, source)}
            self._built[model.id] = frozenset(variant_id(model, name) for name in names)

    def _job_finished(self, job: Job) -> None:
        if not self._draining:
            self._spawn(self._find_built())

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed: %s", type(error).__name__, exc_info=error)
