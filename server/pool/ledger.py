"""Jobs and their events in <cache>/jobs/jobs.sqlite3, so that a restart, or a kill, forgets none.

Several servers may share a cache. A job belongs to the one that took it, for as long as that process lives:
each holds a lock beside the file, and whoever starts adopts the unfinished jobs whose owner is gone.
"""

import contextlib
import logging
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from quant.locks import lock_file, try_lock_file
from server.pool.records import FINAL, EventName, JobEvent, JobRecord

log = logging.getLogger(__name__)

FILE = "jobs.sqlite3"
VERSION = 1  # of the tables; another one is set aside, not read
LOG_LINES = 500  # of one job that are kept
BUSY_S = 2.0  # another server may be writing
SCHEMA = """
CREATE TABLE jobs (id TEXT PRIMARY KEY, owner TEXT NOT NULL, finished REAL, record BLOB NOT NULL);
CREATE TABLE events (job TEXT, number INTEGER, name TEXT NOT NULL, data BLOB NOT NULL,
                     PRIMARY KEY (job, number)) WITHOUT ROWID;
"""


class LedgerError(Exception):
    """A job could not be written down; the message is the reason in a few words."""


class Ledger:
    """Made when the first job is, so that reading a cache adds nothing to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.me = secrets.token_hex(8)
        self._path = folder / FILE
        self._held = contextlib.ExitStack()
        self._db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Nobody owns our jobs from now on."""
        self._held.close()
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- reading ----------------------------------------------------------------------------------

    def load(self) -> list[JobRecord]:
        """All jobs, of all servers, oldest first. A file that cannot be read is set aside."""
        if not self._path.exists():
            return []
        try:
            return self._records("SELECT record FROM jobs ORDER BY rowid")
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
            return []

    def adopt(self) -> set[str]:
        """Ids of unfinished jobs that are ours now, since the server that had them is gone."""
        mine = set()
        with self._errors():
            rows = self._rows("SELECT id, owner FROM jobs WHERE finished IS NULL ORDER BY rowid")
            for id, owner in rows:
                if owner == self.me or self._take_over(id, owner):
                    mine.add(id)
        return mine

    def find(self, id: str) -> JobRecord | None:
        """A job of whatever server."""
        if not self._path.exists():
            return None
        with self._errors():
            return next(iter(self._records("SELECT record FROM jobs WHERE id = ?", id)), None)

    def events(self, job: str, after: int) -> list[JobEvent]:
        with self._errors():
            rows = self._rows(
                "SELECT number, name, data FROM events WHERE job = ? AND number > ? ORDER BY number",
                *(job, after),
            )
        return [JobEvent(number=number, name=name, data=data) for number, name, data in rows]

    # -- writing ----------------------------------------------------------------------------------

    def save(self, record: JobRecord) -> None:
        """Synced: what a client was told is true after a power cut, too. Raises LedgerError."""
        with self._errors(), self._transaction(durable=True) as db:
            db.execute(
                "INSERT INTO jobs (id, owner, finished, record) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, finished = excluded.finished, "
                "record = excluded.record",
                (record.job.id, self.me, _finished(record), msgspec.json.encode(record)),
            )

    def tell(self, job: str, name: EventName, data: Iterable[bytes]) -> None:
        """Add events; of log lines only the last stay. Not synced: a power cut may take the last second."""
        rows = [(job, job, name, item) for item in data]
        with self._errors(), self._transaction(durable=False) as db:
            db.executemany(
                "INSERT INTO events (job, number, name, data) VALUES "
                "(?, 1 + (SELECT coalesce(max(number), 0) FROM events WHERE job = ?), ?, ?)",
                rows,
            )
            if name == "log":
                db.execute(
                    "DELETE FROM events WHERE job = ? AND name = 'log' AND number <= (SELECT number FROM "
                    "events WHERE job = ? AND name = 'log' ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (job, job, LOG_LINES),
                )

    def remove(self, id: str) -> None:
        with self._errors(), self._transaction(durable=False) as db:
            db.execute("DELETE FROM events WHERE job = ?", (id,))
            db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        self.remove_progress(id)

    def prune(self, most: int, oldest: float) -> list[str]:
        """Forget finished jobs beyond the newest `most` and those from before `oldest`. Returns their ids."""
        with self._errors():
            gone = self._rows(
                "SELECT id FROM jobs WHERE finished IS NOT NULL AND (finished < ? OR id NOT IN "
                "(SELECT id FROM jobs WHERE finished IS NOT NULL ORDER BY finished DESC LIMIT ?))",
                *(oldest, most),
            )
        for (id,) in gone:
            self.remove(id)
        return [id for (id,) in gone]

    # -- progress files, which builders replace ---------------------------------------------------

    def progress(self, id: str) -> Path:
        return self.folder / f"{id}.progress"

    def remove_progress(self, id: str) -> None:
        """Where it cannot be removed (a cache that is read-only now), the next start does it."""
        name = self.progress(id).name
        for path in (self.folder / name, *self.folder.glob(f".{name}.*")):
            with contextlib.suppress(OSError):
                path.unlink()

    # -- the file ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        self._own()
        db = self._open()
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with db:
            yield db

    def _own(self) -> None:
        """Raises OSError."""
        path = self._lock(self.me)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_file(path))

    def _lock(self, owner: str) -> Path:
        return self.folder / f"{owner}.server"

    def _take_over(self, id: str, owner: str) -> bool:
        with try_lock_file(self._lock(owner)) as gone, self._transaction(durable=True) as db:
            if not gone:
                return False
            change = "UPDATE jobs SET owner = ? WHERE id = ? AND owner = ?"
            return db.execute(change, (self.me, id, owner)).rowcount == 1

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=BUSY_S)
            try:
                _prepare(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _records(self, query: str, *values: object) -> list[JobRecord]:
        found = []
        for (raw,) in self._rows(query, *values):
            try:
                found.append(msgspec.json.decode(raw, type=JobRecord))
            except msgspec.DecodeError:
                log.warning("the record of a job is unreadable and left out")
        return found

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self._open().execute(query, values).fetchall() if self._path.exists() else []

    def _set_aside(self, error: Exception) -> None:
        """Jobs are forgotten rather than the server kept from starting; variants are not touched."""
        log.error("the list of jobs cannot be read (%s); a new one is begun", error)
        self.close()
        name = f"damaged-{time.time_ns()}.sqlite3"
        with contextlib.suppress(OSError):
            self._path.rename(self.folder / name)
        for ending in ("-wal", "-shm"):
            self._path.with_name(FILE + ending).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises LedgerError."""
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(str(error)) from error
        except OSError as error:
            raise LedgerError((error.strerror or type(error).__name__).lower()) from error


def _prepare(db: sqlite3.Connection) -> None:
    """Write-ahead logging: readers never wait for a writer. Raises sqlite3.DatabaseError."""
    db.execute("PRAGMA journal_mode = WAL")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        with contextlib.suppress(sqlite3.OperationalError):  # another server has just made them
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
    elif version != VERSION:
        raise sqlite3.DatabaseError(f"it is of version {version}")


def _finished(record: JobRecord) -> float | None:
    job = record.job
    return (job.finished or time.time()) if job.state in FINAL else None
