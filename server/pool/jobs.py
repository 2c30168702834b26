"""Work in the background: queued by priority, run in child processes, watched, cancelled, durable.

A job belongs to nobody who waits for it: the first request for a variant and POST /quantize share one. What
it does follows from its record alone, so that a server that was killed goes on where it was.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from quant.canonical import canonical_digest
from quant.errors import BadSource, BuildFailed
from quant.recipe import Recipe, parse_recipe
from quant.search.shelf import sweep
from quant.search.target import Target
from quant.store import VariantStore
from server.catalog import Model
from server.errors import Conflict, DiskFull, ShuttingDown, UnknownJob
from server.pool.background import in_thread
from server.pool.hidden import without_source
from server.pool.kinds import KINDS, Place
from server.pool.lanes import Lane
from server.pool.ledger import Ledger, LedgerError
from server.pool.preflight import preflight
from server.pool.records import FINAL, Job, JobEvent, JobRecord, Kind, Progress, State
from server.pool.searches import PLAINEST, search_order
from server.pool.select import variant_id
from server.pool.sources import Sources, is_hub
from server.pool.story import Story
from server.process.reports import BuildAnswer, BuildReport, Problem, read_report
from server.settings import Settings

__all__ = ["Job", "Jobs", "Problem", "Progress"]

log = logging.getLogger(__name__)

KEPT = 200  # finished jobs that are remembered
KEPT_S = 30 * 86_400.0  # and for how long
PULLS_AT_ONCE = 2
AWAITED = -100  # priority of a build that a request waits for


class Jobs:
    def __init__(self, settings: Settings, store: VariantStore, *, at_once: int | None = None) -> None:
        self.sources = Sources(settings.cache)
        self.listeners: list[Callable[[Job], None]] = []  # told when a job has finished
        self._settings = settings
        self._store = store
        self._ledger = Ledger(settings.cache / "jobs")
        self._story = Story(self._ledger)
        self._records = {record.job.id: record for record in self._ledger.load()}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._lanes = {
            "compute": Lane(at_once or settings.jobs_at_once),
            "network": Lane(PULLS_AT_ONCE),
            "search": Lane(1),
        }
        self._closing = False

    async def start(self) -> None:
        """Take up what an earlier run, or a killed server, left unfinished. May be called again."""
        try:
            mine = self._ledger.adopt()
        except LedgerError as error:
            log.error("unfinished jobs cannot be taken up: %s", error)
            return
        for id in mine - self._tasks.keys():
            if (record := self._records.get(id)) and record.job.state not in FINAL:
                self._ledger.remove_progress(id)
                self._change(id, state="queued", progress=None)
                self._begin(id)

    async def close(self) -> None:
        """End the running work; the next start goes on with it. May be called again."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        self._story.close()
        self._ledger.close()

    async def submit(self, model: Model, recipe: Recipe, *, priority: int = 0) -> Job:
        """A job that builds the variant, or is building it, or is done.

        Raises RequestError where the source or the recipe cannot be used, DiskFull, ShuttingDown.
        """
        record = _record(
            model,
            kind="build",
            variant=variant_id(model, recipe.name),
            recipe=recipe,
            priority=priority,
        )
        if job := self._pending(record):
            return self._hurried(job, priority)
        checked = await preflight(self.sources, self._store, model, recipe)
        if checked.key:
            record = replace(record, job=replace(record.job, key=checked.key))
        if checked.found:
            self._refuse_when_closing()
            return self._cached(record)
        return self.add(record)

    def pull(self, model: Model, *, priority: int = 0, asked: bool = True) -> Job:
        """A job that fetches the model's source from the hub. Raises DiskFull, ShuttingDown, Conflict."""
        if not is_hub(model):
            raise Conflict(f"the source of {model.id} is on this machine; there is nothing to pull")
        record = _record(model, kind="pull", priority=priority)
        return self.add(replace(record, asked=asked))

    def measure(self, model: Model, variant: str, key: str, spec: dict[str, Any], priority: int = 0) -> Job:
        """A job that measures a built variant; `spec`: a MeasureOrder. Raises DiskFull, ShuttingDown."""
        record = _record(model, kind="measure", variant=variant_id(model, variant), priority=priority)
        return self.add(replace(record, spec=spec, job=replace(record.job, key=key)))

    async def search(self, model: Model, target: Target, *, priority: int = 0) -> Job:
        """A job that finds, builds and measures the recipe that meets `target`.

        Raises RequestError where the source cannot be searched, DiskFull, ShuttingDown.
        """
        spec = msgspec.to_builtins(search_order(self._settings, model, target))
        record = replace(
            _record(model, kind="search", priority=priority),
            spec=spec,
            recipe_digest=canonical_digest(spec),
        )
        if self._pending(record) is None:
            await preflight(
                self.sources, self._store, model, parse_recipe(PLAINEST[target.format]), again=True
            )
        return self.add(record)

    def add(self, record: JobRecord) -> Job:
        """Queue the work, unless the same is queued or runs. Raises DiskFull, ShuttingDown."""
        self._refuse_when_closing()
        if job := self._pending(record):
            return self._hurried(job, record.job.priority)
        self._keep(record)
        self._begin(record.job.id)
        return record.job

    def get(self, id: str) -> Job:
        """Raises UnknownJob."""
        return self._get(id).job

    async def cancel(self, id: str) -> Job:
        """Stop a job and remove what it has written; a finished one stays as it is.

        Raises UnknownJob, Conflict for the running job of another server.
        """
        job = self.get(id)
        if job.state not in FINAL and id not in self._tasks:
            raise Conflict("the job runs in another server that shares this cache")
        if task := self._tasks.get(id):
            self._cancelled.add(id)
            task.cancel()
            await asyncio.wait({task})
        return self.get(id)

    async def remove(self, id: str) -> Job:
        """Cancel a job that has not finished; forget one that has. Raises UnknownJob, Conflict."""
        job = self.get(id)
        if job.state not in FINAL:
            return await self.cancel(id)
        self._records.pop(id, None)
        try:
            self._ledger.remove(id)
        except LedgerError as error:
            raise DiskFull(f"the cache cannot be written ({error})") from error
        return job

    async def wait(self, id: str) -> Job:
        """The job once it has finished, or is given up because the server stops. Raises UnknownJob."""
        self.get(id)
        if task := self._tasks.get(id):
            await asyncio.wait({task})
        return self.get(id)

    def events(self, id: str, after: int) -> list[JobEvent]:
        """What has happened since event number `after`. Raises UnknownJob."""
        self.get(id)
        return self._story.events(id, after)

    async def follow(self, id: str, after: int) -> AsyncGenerator[JobEvent]:
        """Events from number `after` on, as they come, up to the job's end. Raises UnknownJob."""
        while True:
            changed = self._story.change_of(id)
            ended = self.get(id).state in FINAL or self._closing
            for event in self._story.events(id, after):
                after = event.number
                yield event
            if ended:
                return
            await changed.wait()

    def list(self) -> list[Job]:
        """Newest first."""
        return [record.job for record in reversed(self._records.values())]

    # -- what is asked for ------------------------------------------------------------------------

    def _get(self, id: str) -> JobRecord:
        if record := self._records.get(id):
            return record
        try:
            found = self._ledger.find(id)  # of another server that shares the cache
        except LedgerError:
            found = None
        if found is None:
            raise UnknownJob("there is no such job")
        return found

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise ShuttingDown("the server is shutting down")

    def _pending(self, wanted: JobRecord) -> Job | None:
        """The job at work that does the same: by the variant's key where it is known, else by its words."""
        bare = replace(wanted, job=replace(wanted.job, key=None)).identity
        for id in self._tasks.keys() - self._cancelled:
            record = self._records[id]
            same = record.identity == wanted.identity
            if same or replace(record, job=replace(record.job, key=None)).identity == bare:
                return record.job
        return None

    def _hurried(self, job: Job, priority: int) -> Job:
        """Whoever asks for a job that waits may move it forward."""
        if priority < job.priority and job.state == "queued":
            self._change(job.id, priority=priority)
            for lane in self._lanes.values():
                lane.hurry(job.id, priority)
        return self.get(job.id)

    def _cached(self, record: JobRecord) -> Job:
        """The earlier job that built it, if it is remembered: asking again adds nothing to the cache."""
        wanted = record.job
        for job in self.list():
            if (job.kind, job.state, job.key, job.model) == ("build", "done", wanted.key, wanted.model):
                return replace(job, outcome="cached")
        job = replace(wanted, state="done", outcome="cached", finished=time.time())
        self._keep(replace(record, job=job))
        return job

    def _keep(self, record: JobRecord) -> None:
        """Raises DiskFull where a new job cannot be written down."""
        try:
            self._ledger.save(record)
        except LedgerError as error:
            raise DiskFull(f"the job cannot be written to the cache ({error})") from error
        self._records[record.job.id] = record
        self._story.state(record.job)
        self._prune()

    # -- running ----------------------------------------------------------------------------------

    def _begin(self, id: str) -> None:
        task = self._tasks[id] = asyncio.create_task(self._run(id), name=f"job {id}")
        task.add_done_callback(partial(self._ended, id))

    async def _run(self, id: str) -> None:
        row = KINDS[self.get(id).kind]
        try:
            await self._pulled(id)
            async with self._lanes[row.lane].turn(id, self.get(id).priority):
                self._change(id, state="running", started=time.time())
                self._conclude(id, await row.run(self._records[id], self._place(id), _Watched(self, id)))
        except asyncio.CancelledError:
            if id in self._cancelled:
                await self._clear(id)
            else:
                self._change(id, state="queued", progress=None)
        except BadSource as error:
            self._finish(id, "failed", error=Problem(error.code, str(error)))
        except Exception as error:
            log.exception("job %s failed", id)
            problem = Problem(BuildFailed.code, f"the work failed ({type(error).__name__})")
            self._finish(id, "failed", error=problem)

    async def _pulled(self, id: str) -> None:
        """Builds of one hub model share one download, which is a job of its own. Raises BadSource."""
        record = self._records[id]
        model = Model(id=record.job.model, source=record.source, revision=record.revision)
        if record.job.kind == "pull" or not is_hub(model) or await self._is_here(model):
            return
        pull = self.pull(model, priority=record.job.priority, asked=False)
        self._story.note(id, f"waits for the source (job {pull.id})")
        try:
            pull = await self.wait(pull.id)
        except asyncio.CancelledError:
            await self._unwanted(pull.id, id)
            raise
        if self._closing:
            raise asyncio.CancelledError
        if pull.error is not None:
            raise BadSource(pull.error.message)
        if pull.state != "done":
            raise BadSource(f"its source was not pulled (job {pull.id} was {pull.state})")

    async def _is_here(self, model: Model) -> bool:
        try:
            await self.sources.open(model)
        except BadSource:
            return False
        return True

    async def _unwanted(self, pull: str, build: str) -> None:
        """Stop a download that nobody asked for, once the last build that waits for it is cancelled."""
        record = self._records[pull]
        waiting = [
            id
            for id in self._tasks.keys() - self._cancelled - {pull, build}
            if self._records[id].source == record.source
        ]
        if build in self._cancelled and not record.asked and not waiting:
            await self.cancel(pull)

    def _place(self, id: str) -> Place:
        return Place(
            cache=self._settings.cache,
            progress=self._ledger.progress(id),
            cache_max_bytes=self._settings.cache_max_bytes,
        )

    def _ended(self, id: str, _: "asyncio.Task[None]") -> None:
        """Also for a task that was cancelled before it began, of which `_run` knows nothing."""
        del self._tasks[id]
        self._ledger.remove_progress(id)
        if id in self._cancelled:
            self._cancelled.remove(id)
            if self._records[id].job.state not in FINAL:
                self._finish(id, "cancelled")
        self._story.changed(id)

    def watched(self, id: str, report: BuildReport) -> None:
        """How far a job is. Written down whether or not anybody looks."""
        report = replace(report, notes=tuple(self._placeless(id, note) for note in report.notes))
        record = self._records[id]
        progress = Progress(report.stage, report.done, report.total, report.unit) if report.stage else None
        job = replace(record.job, progress=progress, key=report.variant or record.job.key)
        self._records[id] = replace(record, job=job)
        self._story.progress(id, report)

    def said(self, id: str, lines: Sequence[str]) -> None:
        self._story.log(id, [self._placeless(id, line) for line in lines])

    def _placeless(self, id: str, text: str) -> str:
        """Paths of this machine stay on it, and names of sources with those who have models.yaml."""
        record = self._records[id]
        return without_source(
            text.replace(str(self._settings.cache), "<cache>"), record.source, record.revision
        )

    def _conclude(self, id: str, answer: BuildAnswer) -> None:
        if answer.error is not None:
            self._finish(id, "failed", error=answer.error)
            return
        record = self._records[id]
        last = record.job.progress
        whole = last and replace(last, done=last.total)
        key = answer.key if record.job.kind != "pull" else None
        job = replace(record.job, outcome=answer.outcome, key=key, progress=whole, found=answer.found)
        if answer.found and (winner := answer.found.winner):
            job = replace(job, variant=f"{job.model}:{winner.variant}")
        self._records[id] = replace(record, job=job)
        self._finish(id, "done")

    def _finish(self, id: str, state: State, *, error: Problem | None = None) -> None:
        if error is not None:
            error = replace(error, message=self._placeless(id, error.message))
        self._change(id, state=state, error=error, finished=time.time())
        self._prune()
        job = self._records[id].job
        what = job.variant or job.model
        log.info("job %s (%s %s) is %s%s", id, job.kind, what, state, f": {error.message}" if error else "")
        for listener in self.listeners:
            listener(job)

    def _change(self, id: str, **fields: object) -> None:
        record = self._records[id]
        self._records[id] = record = replace(record, job=replace(record.job, **fields))
        try:
            self._ledger.save(record)
        except LedgerError as error:
            log.warning("job %s cannot be written down: %s", id, error)
        self._story.state(record.job)

    async def _clear(self, id: str) -> None:
        """Remove what a cancelled build has written, unless another process has taken it over."""
        report = read_report(self._ledger.progress(id))  # newer than what was watched
        job = self.get(id)
        key = (report and report.variant) or job.key
        if job.kind == "search":
            await in_thread(partial(sweep, self._settings.cache))
        if key and job.kind == "build":
            try:
                await in_thread(partial(self._store.discard_scratch, key))
            except OSError as error:
                log.warning("the scratch of job %s cannot be removed: %s", id, error.strerror)

    def _prune(self) -> None:
        try:
            gone = self._ledger.prune(KEPT, time.time() - KEPT_S)
        except LedgerError as error:
            log.warning("old jobs cannot be removed: %s", error)
            return
        for id in gone:
            self._records.pop(id, None)


class _Watched:
    """One job's `Watch`."""

    def __init__(self, jobs: Jobs, id: str) -> None:
        self._jobs = jobs
        self._id = id

    def report(self, report: BuildReport) -> None:
        self._jobs.watched(self._id, report)

    def said(self, lines: Sequence[str]) -> None:
        self._jobs.said(self._id, list(lines))


def _record(
    model: Model,
    *,
    kind: Kind,
    variant: str | None = None,
    recipe: Recipe | None = None,
    priority: int = 0,
) -> JobRecord:
    job = Job(
        id=secrets.token_hex(12),
        kind=kind,
        model=model.id,
        variant=variant,
        priority=priority,
        created=time.time(),
    )
    return JobRecord(
        job=job,
        source=model.source,
        revision=model.revision,
        recipe=dict(recipe.spec) if recipe else {},
        recipe_digest=recipe.digest if recipe else "",
    )
