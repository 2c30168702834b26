"""Jobs as they are shown, and what is needed to run one again."""

from typing import Any, Literal

from msgspec import Struct

from quant.search.found import Found
from server.process.reports import Problem

Kind = Literal["pull", "build", "measure", "search"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
Outcome = Literal["built", "cached", "pulled", "measured", "searched"]
EventName = Literal["state", "progress", "note", "log"]

FINAL = ("done", "failed", "cancelled")


class Progress(Struct, frozen=True):
    stage: str
    done: int
    total: int
    unit: str

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 0


class Job(Struct, frozen=True, kw_only=True):
    """`error.code` is that of a quant error; times are seconds since the epoch."""

    id: str
    kind: Kind = "build"
    state: State = "queued"
    model: str
    variant: str | None = None  # "tiny-chat:q6_k"; of a pull, None
    priority: int = 0  # smaller runs first
    progress: Progress | None = None
    outcome: Outcome | None = None
    key: str | None = None  # of the variant, once it is known
    found: Found | None = None  # of a search: the winner, why it won, and every try
    error: Problem | None = None
    created: float
    started: float | None = None  # when it last began to run
    finished: float | None = None


class JobRecord(Struct, frozen=True, kw_only=True):
    """A job and what is needed to run it again."""

    job: Job
    source: str
    revision: str | None
    recipe: dict[str, Any] = {}  # Recipe.spec; of a pull, empty
    recipe_digest: str = ""
    spec: dict[str, Any] = {}  # what a kind needs besides
    asked: bool = True  # False: a pull that only the builds of its source want

    @property
    def identity(self) -> tuple[str, ...]:
        """Two jobs of one identity do the same work."""
        job = self.job
        if job.kind == "pull":
            return (job.kind, self.source, self.revision or "")
        if job.key is not None and job.kind != "search":
            return (job.kind, job.key)
        return (job.kind, self.source, self.revision or "", self.recipe_digest)


class JobEvent(Struct, frozen=True, kw_only=True):
    """One line of a job's story. `number` grows within a job; `data` is JSON."""

    number: int
    name: EventName
    data: bytes
