"""Builds as jobs: queued, run one at a time in child processes, watched, cancelled, kept over a restart.

A job belongs to nobody who waits for it: the first request for a variant and POST /quantize share one.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from quant.errors import BadRecipe, BadSource, BuildFailed
from quant.errors import DiskFull as NoRoom
from quant.plan import require_buildable, require_room, variant_key
from quant.recipe import Recipe
from quant.source import Source
from quant.store import Variant, VariantStore
from server.catalog import Model
from server.errors import DiskFull, RequestError, ShuttingDown, UnknownJob
from server.pool.background import in_thread
from server.pool.builds import BuildOrder, run_build
from server.pool.records import Job, JobFolder, JobRecord, Progress, State
from server.pool.select import variant_id
from server.pool.sources import Sources, is_hub
from server.process.reports import BuildAnswer, BuildReport, Problem, read_report
from server.settings import Settings

__all__ = ["Job", "Jobs", "Problem", "Progress"]

log = logging.getLogger(__name__)

KEPT = 200  # finished jobs that are remembered
PREFLIGHT_S = 5.0  # for reading the source before a job is accepted; hashing a large one takes longer
FINAL = ("done", "failed", "cancelled")


class Jobs:
    def __init__(self, settings: Settings, store: VariantStore, *, at_once: int = 1) -> None:
        self.sources = Sources(settings.cache)
        self.listeners: list[Callable[[Job], None]] = []  # told when a job has finished
        self._settings = settings
        self._store = store
        self._folder = JobFolder(settings.cache / "jobs")
        self._records = {record.job.id: record for record in self._folder.load()}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._turn = asyncio.Semaphore(at_once)
        self._closing = False

    async def start(self) -> None:
        """Take up what an earlier run left unfinished. May be called again."""
        for id, record in self._records.items():
            if record.job.state not in FINAL and id not in self._tasks:
                self._records[id] = replace(record, job=replace(record.job, state="queued"))
                self._begin(id)

    async def close(self) -> None:
        """End the running builds; the next start resumes them. May be called again."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def submit(self, model: Model, recipe: Recipe) -> Job:
        """A job that builds the variant, or is building it, or is done.

        Raises RequestError where the source or the recipe cannot be used, DiskFull, ShuttingDown.
        """
        if job := self._pending(model, recipe):
            return job
        found = await self._preflight(model, recipe)
        if self._closing:
            raise ShuttingDown("the server is shutting down")
        if job := self._pending(model, recipe):  # of another request, meanwhile
            return job
        if found is not None:
            return self._cached(model, recipe, found)
        return self._queue(model, recipe)

    def get(self, id: str) -> Job:
        """Raises UnknownJob."""
        try:
            return self._records[id].job
        except KeyError:
            raise UnknownJob("there is no such job") from None

    def list(self) -> list[Job]:
        """Newest first."""
        return [record.job for record in reversed(self._records.values())]

    async def cancel(self, id: str) -> Job:
        """Stop a job and remove what it has written; a finished one stays as it is. Raises UnknownJob."""
        self.get(id)
        if task := self._tasks.get(id):
            self._cancelled.add(id)
            task.cancel()
            await asyncio.wait({task})
        return self.get(id)

    async def wait(self, id: str) -> Job:
        """The job once it has finished, or is given up because the server stops. Raises UnknownJob."""
        self.get(id)
        if task := self._tasks.get(id):
            await asyncio.wait({task})
        return self.get(id)

    # -- what is asked for ------------------------------------------------------------------------

    def _pending(self, model: Model, recipe: Recipe) -> Job | None:
        wanted = (model.source, model.revision, recipe.digest)
        for record in self._records.values():
            asked = (record.source, record.revision, record.recipe_digest)
            going = record.job.state not in FINAL and record.job.id not in self._cancelled
            if going and asked == wanted:
                return record.job
        return None

    async def _preflight(self, model: Model, recipe: Recipe) -> Variant | None:
        """The variant, if it is built. Raises RequestError, DiskFull for a build that cannot succeed."""
        try:
            async with asyncio.timeout(PREFLIGHT_S):
                source = await self.sources.open(model)
                return await in_thread(partial(_check, self._store, source, recipe))
        except TimeoutError:
            return None  # the builder will know
        except BadRecipe as error:
            raise RequestError(str(error), param="recipe") from error
        except BadSource as error:
            if is_hub(model):  # not pulled yet: that is a part of the job
                return None
            raise RequestError(f"the source of {model.id} cannot be used: {error}", param="model") from error
        except NoRoom as error:
            raise DiskFull(str(error)) from error

    def _cached(self, model: Model, recipe: Recipe, found: Variant) -> Job:
        """The earlier job that built it, if it is remembered: asking again adds nothing to the cache."""
        for job in self.list():
            if job.state == "done" and job.key == found.key and job.model == model.id:
                return replace(job, outcome="cached")
        record = self._record(model, recipe)
        now = time.time()
        job = replace(record.job, state="done", outcome="cached", key=found.key, finished=now)
        self._keep(replace(record, job=job))
        return job

    def _queue(self, model: Model, recipe: Recipe) -> Job:
        record = self._record(model, recipe)
        self._keep(record)
        self._begin(record.job.id)
        return record.job

    def _record(self, model: Model, recipe: Recipe) -> JobRecord:
        job = Job(
            id=secrets.token_hex(12),
            model=model.id,
            variant=variant_id(model, recipe.name),
            created=time.time(),
        )
        return JobRecord(
            job=job,
            source=model.source,
            revision=model.revision,
            recipe=dict(recipe.spec),
            recipe_digest=recipe.digest,
        )

    def _keep(self, record: JobRecord) -> None:
        """Raises DiskFull where a new job cannot be written down."""
        try:
            self._folder.save(record)
        except OSError as error:
            raise DiskFull(f"the job cannot be written to the cache ({error.strerror})") from error
        self._records[record.job.id] = record
        self._prune()

    # -- running ----------------------------------------------------------------------------------

    def _begin(self, id: str) -> None:
        task = self._tasks[id] = asyncio.create_task(self._run(id), name=f"job {id}")
        task.add_done_callback(partial(self._ended, id))

    async def _run(self, id: str) -> None:
        try:
            async with self._turn:
                self._change(id, state="running")
                self._conclude(id, await self._build(id))
        except asyncio.CancelledError:
            if id in self._cancelled:
                await self._clear(id)
            else:
                self._change(id, state="queued", progress=None)
        except Exception as error:
            log.exception("job %s failed", id)
            self._finish(
                id, "failed", error=Problem(BuildFailed.code, f"the build failed ({type(error).__name__})")
            )

    def _ended(self, id: str, _: "asyncio.Task[None]") -> None:
        """Also for a task that was cancelled before it began, of which `_run` knows nothing."""
        del self._tasks[id]
        self._folder.remove_progress(id)
        if id in self._cancelled:
            self._cancelled.remove(id)
            if self._records[id].job.state not in FINAL:
                self._finish(id, "cancelled")

    async def _build(self, id: str) -> BuildAnswer:
        record = self._records[id]
        order = BuildOrder(
            cache=self._settings.cache,
            source=record.source,
            revision=record.revision,
            recipe=record.recipe,
            progress=self._folder.progress(id),
            cache_max_bytes=self._settings.cache_max_bytes,
        )
        return await run_build(order, partial(self._watch, id))

    def _watch(self, id: str, report: BuildReport) -> None:
        """Kept in memory only: a build that the server's end interrupts tells its progress anew."""
        record = self._records[id]
        progress = Progress(report.stage, report.done, report.total, report.unit) if report.stage else None
        job = replace(record.job, progress=progress, key=report.variant or record.job.key)
        self._records[id] = replace(record, job=job)

    def _conclude(self, id: str, answer: BuildAnswer) -> None:
        if answer.error is not None:
            self._finish(id, "failed", error=answer.error)
            return
        record = self._records[id]
        last = record.job.progress
        whole = last and replace(last, done=last.total)
        job = replace(record.job, outcome=answer.outcome, key=answer.key, progress=whole)
        self._records[id] = replace(record, job=job)
        self._finish(id, "done")

    def _finish(self, id: str, state: State, *, error: Problem | None = None) -> None:
        self._change(id, state=state, error=error, finished=time.time())
        self._prune()
        job = self._records[id].job
        log.info("job %s (%s) is %s%s", id, job.variant, state, f": {error.message}" if error else "")
        for listener in self.listeners:
            listener(job)

    def _change(self, id: str, **fields: object) -> None:
        record = self._records[id]
        self._records[id] = record = replace(record, job=replace(record.job, **fields))
        try:
            self._folder.save(record)
        except OSError as error:
            log.warning("job %s cannot be written down: %s", id, error.strerror)

    async def _clear(self, id: str) -> None:
        """Remove what a cancelled build has written, unless another process has taken it over."""
        report = read_report(self._folder.progress(id))  # newer than what was watched
        if key := (report and report.variant) or self._records[id].job.key:
            try:
                await in_thread(partial(self._store.discard_scratch, key))
            except OSError as error:
                log.warning("the scratch of job %s cannot be removed: %s", id, error.strerror)

    def _prune(self) -> None:
        finished = [id for id, record in self._records.items() if record.job.state in FINAL]
        for id in finished[:-KEPT]:
            del self._records[id]
            self._folder.remove(id)


def _check(store: VariantStore, source: Source, recipe: Recipe) -> Variant | None:
    """The variant, if it is built. Raises BadRecipe, BadSource, DiskFull for a build that cannot succeed."""
    if (found := store.find(variant_key(source, recipe))) is not None:
        return found
    require_buildable(source, recipe)
    require_room(source, recipe, store)
    return None
