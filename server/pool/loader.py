"""From a name to an engine that is ready: find the variant, build it if need be, open it."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quant.errors import BadSource, QuantError
from quant.ready import own_format
from quant.source import Source
from quant.store import Variant, VariantStore
from server.catalog import Model
from server.errors import EngineDied, ServerError
from server.pool.background import in_thread
from server.pool.estimate import RAM, Holding, estimate, vocabulary
from server.pool.gating import Gatekeeper
from server.pool.intact import intact_variant
from server.pool.jobs import AWAITED, Jobs
from server.pool.learned import Learned
from server.pool.memory import Claim, Memory, Tenant
from server.pool.opening import gguf_context, own_context, served_context
from server.pool.policy import LASTING
from server.pool.records import Progress
from server.pool.select import backend_for, find_variant, is_listed, recipe_of, variant_id
from server.pool.sources import is_hub
from server.pool.states import LoadState, Served
from server.pool.uses import ALL, NONE, Use, extra, extras
from server.process.client import EngineClient
from server.settings import Settings
from server.text.model import TextModel
from server.types import Open

log = logging.getLogger(__name__)

OPEN_LIMIT_S = 1800.0  # for an engine to read its weights; a disk that hangs must not hold a load for ever


class LoadFailed(Exception):
    """The message is one line for a client. `lasting`: trying again is useless until something changes."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(slots=True)
class Watch:
    """How far a load is."""

    state: LoadState = "loading"
    job: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to open. `key` is None for a file of the user's own, which no store protects."""

    served: Served
    path: Path
    key: str | None
    context: int | None  # the model's own
    variant: Variant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    served: Served
    engine: EngineClient
    text: TextModel
    held: contextlib.ExitStack  # keeps the variant from being deleted, and its memory reserved
    claim: Claim
    kind: str  # engines of one kind hold the same, for the same uses
    extras: dict[Use, int]  # bytes of RAM that uses would add
    load_s: float

    @property
    def learned_as(self) -> str:
        return of_uses(self.kind, self.claim.uses)

    @property
    def uses(self) -> frozenset[Use]:
        """What there is room for: uses that take none, too."""
        return self.claim.uses | (ALL - self.extras.keys())

    async def close(self) -> None:
        try:
            await self.engine.stop()
        finally:
            self.held.close()


class Loader:
    def __init__(
        self,
        settings: Settings,
        store: VariantStore,
        jobs: Jobs,
        memory: Memory,
        learned: Learned,
        gatekeeper: Gatekeeper,
    ) -> None:
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._memory = memory
        self._learned = learned
        self._gpu = next((device for device in memory.budgets if device != RAM), None)
        self._gatekeeper = gatekeeper

    async def load(
        self,
        model: Model,
        name: str,
        watch: Watch,
        tenant: Tenant,
        *,
        patient: bool = True,
        uses: frozenset[Use] = NONE,
    ) -> Loaded:
        """`patient`: wait for memory that others use. `uses`: what there shall be room for, if it can.

        Raises LoadFailed, NoRoom; EngineDied where the engine's process ended while it opened the variant.
        """
        try:
            target = await self._target(model, name, watch)
            watch.state, watch.progress = "loading", None
            loaded = await self._open(model, target, watch, tenant, patient, uses)
            if target.variant is not None:  # it may have been measured meanwhile
                self._gatekeeper.look(model, target.variant)
            return loaded
        except EngineDied:
            raise
        except (QuantError, ServerError) as error:
            raise LoadFailed(str(error), lasting=error.code in LASTING) from error
        except OSError as error:
            raise LoadFailed(f"the cache cannot be read or written ({error.strerror})") from error

    async def find(self, model: Model, name: str) -> Variant | None:
        """The built variant of that name."""
        try:
            source = await self._jobs.sources.open(model)
        except BadSource:
            return None
        return await in_thread(partial(find_variant, self._store, source, name))

    async def _target(self, model: Model, name: str, watch: Watch) -> Target:
        source = await self._source(model)
        if source is not None and source.kind == "gguf" and name == model.default:
            return await self._own_file(model, name, source)
        if source is not None and model.is_ready and name == model.default:
            return await self._own_folder(model, name, source)
        variant = await self._intact(source, name)
        if variant is None:
            await self._build(model, name, watch)
            variant = await self._intact(await self._jobs.sources.open(model), name)
        if variant is None:
            raise LoadFailed("its variant was built and is gone again")
        return await self._variant(model, name, variant)

    async def _source(self, model: Model) -> Source | None:
        """None for a hub id that has not been pulled. Raises BadSource."""
        try:
            return await self._jobs.sources.open(model)
        except BadSource:
            if is_hub(model):
                return None
            raise

    async def _intact(self, source: Source | None, name: str) -> Variant | None:
        return None if source is None else await in_thread(partial(intact_variant, self._store, source, name))

    async def _build(self, model: Model, name: str, watch: Watch) -> None:
        recipe = recipe_of(name)
        if recipe is None or not is_listed(model, name):
            raise LoadFailed("its variant is not built any more")
        job = await self._jobs.submit(model, recipe, priority=AWAITED)
        watch.state, watch.job = "building", job.id
        job = await self._jobs.wait(job.id)
        if job.error is not None:
            reason = f"its build failed: {job.error.message} (job {job.id})"
            raise LoadFailed(reason, lasting=job.error.code in LASTING)
        if job.state != "done":
            raise LoadFailed(f"its build was cancelled (job {job.id})")

    async def _own_file(self, model: Model, name: str, source: Source) -> Target:
        served = self._served(model, name, source.digest, "gguf")
        context = await in_thread(partial(gguf_context, source.path))
        return Target(served=served, path=source.path, key=None, context=context)

    async def _own_folder(self, model: Model, name: str, source: Source) -> Target:
        """A quantized checkpoint. Raises BadSource for one whose config.json is of another kind by now."""
        own = own_format(source.config)
        if own is None:
            raise BadSource("the checkpoint is not quantized any more; restart the server")
        served = self._served(model, name, source.digest, own)
        context = source.config.get("max_position_embeddings")
        return Target(served=served, path=source.path, key=None, context=context)

    async def _variant(self, model: Model, name: str, variant: Variant) -> Target:
        found = await self._gatekeeper.judge(model, variant)
        served = self._served(model, name, variant.key, variant.manifest.format, found.verdict.state)
        facts = await in_thread(partial(own_context, variant.path))
        return Target(served=served, path=variant.path, key=variant.key, context=facts, variant=variant)

    def _served(
        self, model: Model, name: str, key: str, format_name: str, label: str = "unmeasured"
    ) -> Served:
        return Served(
            id=variant_id(model, name),
            model=model.id,
            recipe=name,
            key=key,
            format=format_name,
            backend=backend_for(model, format_name),
            label=label,
        )

    async def _open(
        self,
        model: Model,
        target: Target,
        watch: Watch,
        tenant: Tenant,
        patient: bool,
        uses: frozenset[Use],
    ) -> Loaded:
        def report(done: float) -> None:
            watch.progress = Progress("load", round(100 * done), 100, "%")

        spec = self._spec(model, target)
        kind, need, sizes, uses = await self._need(target, spec, uses)
        reload_s = self._learned.load_s(kind, sum(need.values()))
        async with contextlib.AsyncExitStack() as undo:
            held = undo.enter_context(contextlib.ExitStack())
            if target.key is not None:
                held.enter_context(self._store.use(target.key))
            claim = await self._memory.reserve(tenant, need, reload_s, patient=patient)
            claim.uses = uses
            held.callback(claim.release)
            started = time.monotonic()
            try:
                async with asyncio.timeout(OPEN_LIMIT_S):
                    engine = await EngineClient.start(spec, on_progress=report)
            except TimeoutError:
                raise LoadFailed(f"it was not open after {OPEN_LIMIT_S:.0f} s") from None
            undo.push_async_callback(engine.stop)
            text = await _text(engine, target.path)
            undo.pop_all()
            claim.reload_s = load_s = time.monotonic() - started
            return Loaded(
                served=target.served,
                engine=engine,
                text=text,
                held=held,
                claim=claim,
                kind=kind,
                extras=sizes,
                load_s=load_s,
            )

    async def _need(
        self, target: Target, spec: Open, uses: frozenset[Use]
    ) -> tuple[str, dict[str, int], dict[Use, int], frozenset[Use]]:
        """What tells engines of this kind from others, what they hold, what uses add, and for which of them
        there is room on this machine. Raises BadSource."""
        holding = Holding(
            backend=spec.backend,
            context=spec.context or self._settings.default_context,
            parallel=spec.parallel,
            kv_tokens=spec.kv_tokens,
        )
        estimated = await in_thread(partial(estimate, target.path, holding, gpu=self._gpu_of(spec)))
        kind = f"{target.served.key} {spec.backend} {spec.context} {spec.parallel} {spec.kv_tokens}"
        sizes = extras(spec.backend, await in_thread(partial(vocabulary, target.path)))
        plain = self._learned.need(kind, estimated)
        if not uses:
            return kind, plain, sizes, uses
        ram = plain[RAM] + extra(uses, sizes)  # at least: not all that had the room made use of it
        seen = self._learned.need(of_uses(kind, uses), {RAM: ram})
        wide = {**plain, RAM: max(ram, seen[RAM])}
        if wide[RAM] > self._memory.budgets[RAM]:
            return kind, plain, sizes, NONE  # each has its turn, or is told (Room)
        return kind, wide, sizes, uses

    def _gpu_of(self, spec: Open) -> str | None:
        return None if spec.backend == "llama" else self._gpu

    def _spec(self, model: Model, target: Target) -> Open:
        own = target.context
        if model.context and own and model.context > own:
            log.warning("%s: context %d is cut to the model's own %d", model.id, model.context, own)
        return Open(
            backend=target.served.backend,
            variant=str(target.path),
            context=served_context(model.context, target.context, self._settings.default_context),
            parallel=model.parallel,
            kv_tokens=model.kv_tokens,
            threads=model.threads,
            options={"deterministic": "true"} if model.deterministic else {},
        )


def of_uses(kind: str, uses: frozenset[Use]) -> str:
    return " ".join([kind, *sorted(uses)])


async def _text(engine: EngineClient, path: Path) -> TextModel:
    if engine.ready.text is not None:
        return await in_thread(partial(TextModel.from_engine, engine.ready.text, engine.tokenize))
    return await in_thread(partial(TextModel.from_folder, path))
