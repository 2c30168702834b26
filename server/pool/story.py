"""What happened to each job, in order: kept in the ledger, and told to those who follow.

Progress is thinned to whole percents of each stage, so that a build of an hour is some hundred events.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence

import msgspec

from server.pool.ledger import Ledger, LedgerError
from server.pool.records import EventName, Job, JobEvent, Progress
from server.process.reports import BuildReport

log = logging.getLogger(__name__)

Mark = tuple[str, int]  # stage, percent


class Story:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._marks: dict[str, Mark] = {}
        self._notes: dict[str, set[str]] = {}
        self._changes: dict[str, asyncio.Event] = {}
        self._quiet = False  # the ledger cannot be written; said once

    def events(self, id: str, after: int) -> list[JobEvent]:
        try:
            return self._ledger.events(id, after)
        except LedgerError as error:
            log.warning("the events of job %s cannot be read: %s", id, error)
            return []

    def change_of(self, id: str) -> asyncio.Event:
        """Set at the next event of the job."""
        return self._changes.setdefault(id, asyncio.Event())

    def changed(self, id: str) -> None:
        if waiting := self._changes.pop(id, None):
            waiting.set()

    def close(self) -> None:
        for id in list(self._changes):
            self.changed(id)

    def state(self, job: Job) -> None:
        self._tell(job.id, "state", [msgspec.json.encode(job)])
        if job.finished is not None:
            self._marks.pop(job.id, None)
            self._notes.pop(job.id, None)

    def progress(self, id: str, report: BuildReport) -> None:
        """Also the notes that came with it."""
        told = self._notes.setdefault(id, set())
        for text in (text for text in report.notes if text not in told):
            told.add(text)
            self.note(id, text)
        if not report.stage:
            return
        step = Progress(report.stage, report.done, report.total, report.unit)
        if (mark := (step.stage, step.percent)) != self._marks.get(id):
            self._marks[id] = mark
            self._tell(id, "progress", [msgspec.json.encode(step)])

    def note(self, id: str, text: str) -> None:
        self._tell(id, "note", [msgspec.json.encode(text)])

    def log(self, id: str, lines: Sequence[str]) -> None:
        for line in lines:
            log.debug("job %s: %s", id, line)
        self._tell(id, "log", [msgspec.json.encode(line) for line in lines])

    def _tell(self, id: str, name: EventName, data: Iterable[bytes]) -> None:
        try:
            self._ledger.tell(id, name, data)
            self._quiet = False
        except LedgerError as error:
            if not self._quiet:
                log.warning("events of jobs cannot be written down: %s", error)
            self._quiet = True
        self.changed(id)
