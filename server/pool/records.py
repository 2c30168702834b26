"""Jobs as they are shown, and as they lie in <cache>/jobs so that a restart still knows them."""

import logging
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from server.process.reports import Problem, replace_json

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]
Outcome = Literal["built", "cached"]


class Progress(Struct, frozen=True):
    stage: str
    done: int
    total: int
    unit: str


class Job(Struct, frozen=True, kw_only=True):
    """`error.code` is that of a quant error; times are seconds since the epoch."""

    id: str
    kind: Literal["build"] = "build"
    state: State = "queued"
    model: str
    variant: str  # "tiny-chat:q6_k"
    progress: Progress | None = None
    outcome: Outcome | None = None
    key: str | None = None  # of the variant, once it is known
    error: Problem | None = None
    created: float
    finished: float | None = None


class JobRecord(Struct, frozen=True, kw_only=True):
    """A job and what is needed to run it again."""

    job: Job
    source: str
    revision: str | None
    recipe: dict[str, Any]  # Recipe.spec
    recipe_digest: str


class JobFolder:
    """<cache>/jobs. Made when the first job is, so that reading a cache adds nothing to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> list[JobRecord]:
        """Oldest first. Progress and half-written files of an earlier run are removed."""
        for stray in (*self._folder.glob("*.progress"), *self._folder.glob(".*")):
            stray.unlink(missing_ok=True)
        records = [record for path in self._folder.glob("*.json") if (record := self._read(path))]
        return sorted(records, key=lambda record: record.job.created)

    def save(self, record: JobRecord) -> None:
        """Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_json(self._folder / f"{record.job.id}.json", record)

    def remove(self, id: str) -> None:
        (self._folder / f"{id}.json").unlink(missing_ok=True)

    def progress(self, id: str) -> Path:
        return self._folder / f"{id}.progress"

    def remove_progress(self, id: str) -> None:
        name = self.progress(id).name
        for path in (self._folder / name, *self._folder.glob(f".{name}.*")):
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> JobRecord | None:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=JobRecord)
        except (OSError, msgspec.DecodeError):
            log.warning("the record %s of a job is unreadable and left out", path.name)
            return None
        return record if record.job.id == path.stem else None
