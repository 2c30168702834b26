"""What is known of variants' quality, and what may be served. Measurements are jobs of their own.

A verdict is made anew from measurement.json and models.yaml whenever it is needed: neither remembers it.
"""

import asyncio
import logging
from functools import cache, partial

import msgspec

from quant.measure.gate import Verdict
from quant.measure.report import Judged, judged
from quant.store import Variant, VariantStore
from server.backends import registry
from server.catalog import Model
from server.errors import ServerError, VariantRejected
from server.pool.background import in_thread
from server.pool.choosing import Candidate
from server.pool.jobs import AWAITED, Jobs
from server.pool.opening import own_context, served_context
from server.pool.records import Job
from server.pool.select import backend_for, is_listed, variant_id
from server.process.orders import MeasureOrder
from server.settings import Settings

log = logging.getLogger(__name__)

REFERENCE = "f32"  # as what measurements compare with is kept


class Gatekeeper:
    def __init__(self, settings: Settings, store: VariantStore, jobs: Jobs) -> None:
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._known: dict[str, Judged] = {}  # by variant id

    def known(self, id: str) -> Judged | None:
        """As it was judged last; None for what was never looked at, or is no variant of ours."""
        return self._known.get(id)

    def of_model(self, model: Model) -> list[Judged]:
        """All of the model's that were looked at."""
        return [one for id, one in self._known.items() if id.startswith(f"{model.id}:")]

    def look(self, model: Model, variant: Variant) -> Judged:
        """Judge what is measured by now. Reads one small file."""
        name = variant.manifest.recipe.name
        found = self._known[variant_id(model, name)] = judged(variant, model.gate.of(name))
        return found

    def require_allowed(self, model: Model, name: str) -> None:
        """Raises VariantRejected for a variant beyond the gate, with its figures."""
        known = self._known.get(variant_id(model, name))
        if known is None or not known.barred:
            return
        if self.look(model, known.variant).barred:  # measured again since?
            raise refusal(variant_id(model, name), known.verdict)

    def bars(self, id: str) -> bool:
        """Whether the variant is known to be beyond its gate, and not to be served."""
        known = self._known.get(id)
        return known is not None and known.barred

    def notice(self, id: str) -> str | None:
        """What every answer of a variant says that is served against its gate."""
        known = self._known.get(id)
        if known is None or known.verdict.state != "rejected" or not known.gate.serve_anyway:
            return None
        reasons = "; ".join(known.verdict.reasons).replace("±", "+-")  # headers are ASCII
        return f"rejected, served anyway: {reasons}"

    async def judge(self, model: Model, variant: Variant) -> Judged:
        """Before a variant is opened. Where nothing is known yet, it waits for a quick measurement, but no
        longer than the budget: then the variant counts as unmeasured until the measurement is through.

        Raises VariantRejected.
        """
        found = await in_thread(partial(self.look, model, variant))
        budget = self._settings.measure_budget_s
        if found.measurement is None and budget > 0:
            await self._measured(model, variant, budget)
            found = await in_thread(partial(self.look, model, variant))
        if found.barred:
            raise refusal(variant_id(model, found.name), found.verdict)
        return found

    async def _measured(self, model: Model, variant: Variant, budget: float) -> None:
        try:
            job = self.submit(model, variant, quick=True, budget_s=0.75 * budget, priority=AWAITED)
            await asyncio.wait_for(self._jobs.wait(job.id), budget)
        except TimeoutError:
            log.info("%s is not measured within %g s; it is served unmeasured", model.id, budget)
        except (ServerError, OSError) as error:
            log.warning("%s cannot be measured: %s", model.id, error)

    def submit(
        self,
        model: Model,
        variant: Variant,
        *,
        quick: bool,
        budget_s: float | None = None,
        priority: int = 0,
    ) -> Job:
        """A job that measures the variant. Raises RequestError, DiskFull, ShuttingDown."""
        manifest = variant.manifest
        order = MeasureOrder(
            cache=str(self._settings.cache),
            source=model.source,
            revision=model.revision,
            key=variant.key,
            backend=backend_for(model, manifest.format),
            context=served_context(model.context, own_context(variant.path), self._settings.default_context),
            parallel=model.parallel,
            threads=model.threads,
            budget_s=budget_s,
            quick=quick,
        )
        return self._jobs.measure(
            model, manifest.recipe.name, variant.key, msgspec.to_builtins(order), priority
        )


def refusal(id: str, verdict: Verdict) -> VariantRejected:
    return VariantRejected(
        f"{id} is too far from its source to be served: {'; '.join(verdict.reasons)}; "
        "gate: {serve_anyway: true} in models.yaml serves it all the same",
        param="model",
    )


def candidate(model: Model, one: Judged, loaded: bool, held: int = 0) -> Candidate:
    """`held`: bytes of memory that the loader counts with where it has seen such an engine, else 0."""
    found = one.measurement
    speed = found.speed if found else None
    device, problem = ("cpu", "") if loaded else _needs(model.backend, one.variant.manifest.format)
    return Candidate(
        name=one.name,
        state=one.verdict.state,
        barred=one.barred,
        kl=found.kl.mean.value if found else None,
        bytes=one.variant.manifest.bytes,
        memory=held or (speed.memory_bytes if speed else one.variant.manifest.bytes),
        speed=speed.decode_8 if speed else None,
        loaded=loaded,
        device=device,
        problem=problem,
        is_reference=one.name == REFERENCE and found is None and not is_listed(model, REFERENCE),
    )


@cache
def _needs(backend: str, format_name: str) -> tuple[str, str]:
    """The device of what opens the format, and why nothing does. What is installed stays while we run."""
    try:
        found = registry.for_format(format_name) if backend == "auto" else registry.load(backend)
        return registry.device_of(found), ""
    except ServerError as error:
        return "cpu", str(error)
