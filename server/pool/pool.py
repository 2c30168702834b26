"""Models by name: each request borrows the engine of the variant that it names."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial

from quant.errors import QuantError
from quant.store import Variant, VariantStore
from server.catalog import Catalog, Model
from server.errors import MemoryBusy, ModelUnavailable, ServerError, ShuttingDown, UnknownModel
from server.pool import policy
from server.pool.background import in_thread
from server.pool.choosing import MODES, Chosen, Mode, choose
from server.pool.estimate import RAM
from server.pool.gating import Gatekeeper, candidate
from server.pool.host import VariantHost
from server.pool.jobs import Jobs
from server.pool.learned import Learned
from server.pool.loader import Loaded, Loader
from server.pool.memory import Claim, Memory
from server.pool.promotions import Promotions
from server.pool.records import Job
from server.pool.select import built_of, is_listed, may_be_a_variant, variant_id
from server.pool.situation import situation
from server.pool.states import EngineState, Lease, ModelState, Served
from server.pool.uses import NONE, Use
from server.process.devices import family, gpu_bytes, gpu_totals, held_bytes
from server.process.memory import machine_memory
from server.settings import Settings

__all__ = ["EngineState", "Lease", "ModelState", "Pool", "Served"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
MEASURE_S = 2.0  # between two looks at what engines hold
RAM_SHARE, GPU_SHARE = 0.8, 0.92  # of a device, where no budget is given


class Pool:
    def __init__(self, settings: Settings, catalog: Catalog, store: VariantStore, jobs: Jobs) -> None:
        self.catalog = catalog
        self._store = store
        self._jobs = jobs
        self.memory = Memory(budgets(settings))
        self._learned = Learned(settings.cache)
        self.gatekeeper = Gatekeeper(settings, store, jobs)
        self.promotions = Promotions(settings.cache)
        self._loader = Loader(settings, store, jobs, self.memory, self._learned, self.gatekeeper)
        self._hosts: dict[str, VariantHost] = {}  # by variant id
        self._built: dict[str, frozenset[str]] = {}  # ids of built variants, by model id
        self._bytes: dict[str, int] = {}  # of built variants, by their id
        self._retired: set[VariantHost] = set()  # of models that are served no more, or otherwise
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        jobs.listeners.append(self._job_finished)

    async def start(self) -> None:
        """Returns at once: models with `preload` load in the background."""
        await self._jobs.start()
        self._spawn(self._tidy())
        self._spawn(self._find_built())
        self._spawn(self._measure_memory())
        for model in self.catalog.models:
            if model.preload:
                self._spawn(self._preload(model))

    async def _tidy(self) -> None:
        """What a killed server left behind; a cache that may only be read stays as it is."""
        with contextlib.suppress(OSError):
            await in_thread(self._store.sweep)

    def replace(self, catalog: Catalog) -> None:
        """Serve these models from now on. Engines of others, or of changed ones, end with their last use."""
        before = {model.id: model for model in self.catalog.models}
        self.catalog = catalog
        kept = {model.id for model in catalog.models if before.get(model.id) == model}
        for id, host in list(self._hosts.items()):
            if host.model.id not in kept:
                del self._hosts[id]
                self._spawn(self._retire(host))
        self._spawn(self._find_built())
        for model in catalog.models:
            if model.preload and model.id not in kept:
                self._spawn(self._preload(model))

    async def _retire(self, host: VariantHost) -> None:
        self._retired.add(host)
        try:
            while host.users:
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            await host.close()
            self._retired.discard(host)

    def drain(self) -> None:
        """From now on `acquire` raises ShuttingDown; what runs goes on."""
        self._draining = True

    async def close(self, grace_s: float = 30.0) -> None:
        """Drain, wait at most `grace_s` for leases to end, then end every engine and build."""
        self.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(host.loaded and host.users for host in (*self._hosts.values(), *self._retired)):
                    await asyncio.sleep(DRAIN_POLL_S)
        for task in self._tasks:
            task.cancel()
        await self._learn()
        await asyncio.gather(
            self._jobs.close(),
            *(host.close() for host in self._hosts.values()),
            *self._tasks,
            return_exceptions=True,
        )
        await in_thread(self._store.sweep_locks)  # of builds that were ended

    @contextlib.asynccontextmanager
    async def acquire(
        self, name: str, *, wait_s: float | None, uses: frozenset[Use] = NONE
    ) -> AsyncIterator[Lease]:
        """Borrow the engine of "model" or "model:variant", which is built and loaded first if need be, with
        room for these uses.

        `wait_s` None: for as long as that takes. Raises UnknownModel, ModelLoading, ModelUnavailable,
        MemoryBusy, VariantRejected, ShuttingDown. Where memory is short, a model with `fallback` answers by a
        smaller variant.
        """
        model, variant = self.named(name)
        if self._draining:
            raise ShuttingDown("the server is shutting down", retry_after=1)
        host = await self._host(model, variant or self.default(model))
        self.gatekeeper.require_allowed(model, host.name)
        smaller = [] if variant or not model.fallback else self._smaller(host)
        host.patient = not smaller
        try:
            loaded, host = await self._first_with_room([host, *smaller], wait_s, uses)
        except ModelUnavailable:
            self.gatekeeper.require_allowed(model, host.name)  # that may be why
            raise
        try:
            self.gatekeeper.require_allowed(model, host.name)  # it may have been measured meanwhile
            yield Lease(
                model=model,
                variant=loaded.served,
                engine=loaded.engine,
                text=loaded.text,
                uses=loaded.uses,
            )
        finally:
            host.release()

    async def _first_with_room(
        self, hosts: Sequence[VariantHost], wait_s: float | None, uses: frozenset[Use]
    ) -> tuple[Loaded, VariantHost]:
        """The engine of the first host that memory has room for. Raises what the first one did."""
        refused: ServerError | None = None
        for host in hosts:
            try:
                return await host.acquire(wait_s, uses), host
            except (MemoryBusy, ModelUnavailable) as error:
                if not host.no_room:
                    raise
                refused = refused or error
        assert refused is not None, "there is at least one host"
        raise refused

    def _smaller(self, host: VariantHost) -> list[VariantHost]:
        """Built variants of the same model that need less, those that are loaded first, then by size."""
        most = self._bytes.get(host.id)
        if most is None or host.loaded is not None:
            return []
        built = self._built.get(host.model.id, ())
        ids = [id for id in built if self._bytes.get(id, most) < most and not self.gatekeeper.bars(id)]
        hosts = [self._hosted(host.model, id.removeprefix(f"{host.model.id}:")) for id in ids]
        return sorted(hosts, key=lambda one: (one.loaded is None, -self._bytes[one.id]))

    def _hosted(self, model: Model, name: str) -> VariantHost:
        id = variant_id(model, name)
        if id not in self._hosts:
            self._hosts[id] = VariantHost(model, name, self._loader, self.memory)
        return self._hosts[id]

    def named(self, name: str) -> tuple[Model, str | None]:
        """What a request's `model` means: `auto` and the like are variants just now. Raises UnknownModel."""
        model, variant = self.catalog.resolve(name)
        mode = next((mode for mode in MODES if mode == variant), None)
        return model, variant if mode is None else self.choice(model, mode).name

    def choice(self, model: Model, mode: Mode) -> Chosen:
        """Which of the model's built variants `model:auto` and the like mean."""
        loaded = {host.id for host in self._hosts.values() if host.loaded}
        candidates = [
            candidate(
                model,
                one,
                variant_id(model, one.name) in loaded,
                self._learned.largest(one.variant.manifest.key, RAM),
            )
            for one in self.gatekeeper.of_model(model)
        ]
        return choose(mode, candidates, situation(self.memory.budgets[RAM]))

    def default(self, model: Model) -> str:
        """The variant that answers to the bare name: the promoted one, else what models.yaml says."""
        promoted = self.promotions.of(model.id)
        return model.default if promoted is None or model.is_ready else promoted.variant

    def hosted(self, id: str) -> VariantHost | None:
        return self._hosts.get(id)

    async def look_again(self) -> None:
        """See what else was built or measured, by whomever."""
        await self._find_built()

    def states(self) -> list[ModelState]:
        """One for each model of the catalog, in its order."""
        return [self.state(model) for model in self.catalog.models]

    def state(self, model: Model, name: str | None = None) -> ModelState:
        """Of the variant called `name`, or of the default. Raises UnknownModel for one that is not there."""
        id, built = variant_id(model, name or self.default(model)), self._variants(model)
        if name and not is_listed(model, name) and id not in built:
            raise self._no_such_variant(model)
        return self._state(model, id, built)

    @property
    def loads(self) -> dict[str, int]:
        """How often each variant was loaded."""
        return {host.id: host.loads for host in self._hosts.values()}

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
            *(variant_id(model, name) for name in (self.default(model), *model.variants)),
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
            rests=host.rests and loaded is None,
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
        if not await self.is_there(model, name):
            raise self._no_such_variant(model)
        return self._hosted(model, name)

    async def is_there(self, model: Model, name: str) -> bool:
        """Whether the variant is built, or is built on demand."""
        return is_listed(model, name) or await self._is_built(model, name)

    async def _is_built(self, model: Model, name: str) -> bool:
        return may_be_a_variant(model, name) and await self._loader.find(model, name) is not None

    async def _preload(self, model: Model) -> None:
        """Until it is loaded, or until trying again is useless. A later request tries again in any case."""
        host = await self._host(model, self.default(model))
        while True:
            await asyncio.wait({host.load()})
            if host.loaded is not None or host.rests or host.lasting:
                return
            refused = host.refusal()
            if refused is None and not host.no_room:
                return
            await asyncio.sleep(refused.retry_s if refused else policy.LOADING_RETRY_S)

    async def _measure_memory(self) -> None:
        """What engines really hold, so that the next estimates are right and a growing one is noticed."""
        while True:
            await asyncio.sleep(MEASURE_S)
            await self._learn()

    async def _learn(self) -> None:
        for host in list(self._hosts.values()):
            if (loaded := host.loaded) is not None:
                held = await in_thread(partial(_held, loaded.engine.pid, loaded.claim))
                if host.loaded is loaded and held.get(RAM):
                    self.memory.measured(loaded.claim, held)
                    self._learned.add(loaded.learned_as, dict(loaded.claim.used), loaded.load_s)
        await in_thread(self._learned.save)

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
            sizes = {
                variant_id(model, variant.manifest.recipe.name): variant.manifest.bytes
                for variant in built_of(variants, source)
            }
            self._built[model.id] = frozenset(sizes)
            self._bytes.update(sizes)
            for variant in built_of(variants, source):
                self._judge_again(model, variant)
            self._check_promoted(model)

    def _check_promoted(self, model: Model) -> None:
        """A promoted variant that somebody removed does not take the model's name with it."""
        promoted = self.promotions.of(model.id)
        if promoted is None or is_listed(model, promoted.variant):
            return
        if variant_id(model, promoted.variant) not in self._built[model.id]:
            log.error("%s: the promoted variant %s is gone", model.id, promoted.variant)
            self.promotions.ignore(model.id)

    def _judge_again(self, model: Model, variant: Variant) -> None:
        """An engine whose measurement came late, and is bad, gets no more requests."""
        found = self.gatekeeper.look(model, variant)
        host = self._hosts.get(variant_id(model, found.name))
        if host is not None and found.barred:
            host.retire()

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


def budgets(settings: Settings) -> dict[str, int]:
    """Bytes that engines may hold, by device."""
    ram = settings.memory_budget or int(RAM_SHARE * machine_memory())
    gpus = {device: settings.gpu_memory_budget or int(GPU_SHARE * b) for device, b in gpu_totals().items()}
    return {RAM: ram, **gpus}


def _held(pid: int, claim: Claim) -> dict[str, int]:
    pids = family(pid)
    gpus = {device: gpu_bytes(pids) for device in claim.need if device != RAM}
    return {RAM: held_bytes(pids), **gpus}
