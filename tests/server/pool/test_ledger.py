"""The list of jobs on disk: whole after a kill, shared between servers, bounded, and bad files set aside."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from server.pool import ledger as module
from server.pool.ledger import Ledger, LedgerError
from server.pool.records import Job, JobRecord, State


def record(id: str, state: State = "queued", finished: float | None = None) -> JobRecord:
    job = Job(id=id, model="m", variant="m:f16", state=state, created=1.0, finished=finished)
    return JobRecord(job=job, source="/m", revision=None, recipe={"type": "f16"}, recipe_digest="d")


def test_what_is_saved_is_loaded_in_order_and_reading_alone_makes_no_file(tmp_path: Path) -> None:
    empty = Ledger(tmp_path / "none")
    assert (empty.load(), empty.find("a"), empty.adopt(), empty.events("a", 0)) == ([], None, set(), [])
    empty.close()
    assert not (tmp_path / "none").exists()
    ledger = Ledger(tmp_path)
    for id in ("b", "a", "c"):
        ledger.save(record(id))
    ledger.save(record("a", "running"))
    ledger.close()
    later = Ledger(tmp_path)
    assert later.load() == [record("b"), record("a", "running"), record("c")]
    assert later.adopt() == {"a", "b", "c"}
    later.close()


def test_a_job_of_a_living_server_is_seen_but_not_taken(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.save(record("a"))
    second.save(record("b"))
    assert second.find("a") == record("a")
    assert (second.adopt(), first.adopt()) == ({"b"}, {"a"})
    first.close()
    third = Ledger(tmp_path)
    assert third.adopt() == {"a"}
    assert second.adopt() == {"b"}


def test_a_server_killed_at_any_write_leaves_whole_jobs_that_the_next_adopts(tmp_path: Path) -> None:
    """A process writes jobs and events as fast as it can and says which are accepted; it is killed."""
    writer = (
        "import sys; from pathlib import Path; from tests.server.pool.test_ledger import record; "
        "from server.pool.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    ledger.save(record(f'j{n}')); ledger.tell(f'j{n}', 'note', [b'1', b'2']); print(n, flush=True)\n"
    )
    command = [sys.executable, "-c", writer, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and int(line) < 60:
            pass
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        accepted = int((line + process.stdout.read()).split()[-1]) + 1
    ledger = Ledger(tmp_path)
    jobs = ledger.load()
    assert jobs[:accepted] == [record(f"j{n}") for n in range(accepted)]
    assert len(jobs) <= accepted + 1
    assert ledger.adopt() == {one.job.id for one in jobs}
    assert all([e.number for e in ledger.events(f"j{n}", 0)] == [1, 2] for n in range(accepted))
    ledger.close()
    assert os.listdir(tmp_path) == ["jobs.sqlite3"]  # the lock of the killed one is swept


def test_events_are_numbered_within_a_job_and_only_the_last_lines_of_its_log_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_LINES", 5)
    ledger = Ledger(tmp_path)
    ledger.tell("a", "state", [b"{}"])
    ledger.tell("b", "note", [b'"other"'])
    for start in (0, 4, 8):
        ledger.tell("a", "log", [msgspec.json.encode(str(n)) for n in range(start, start + 4)])
    ledger.tell("a", "progress", [b"1", b"2"])
    events = ledger.events("a", 0)
    assert [(e.number, e.name) for e in events if e.name != "log"] == [
        (1, "state"),
        (14, "progress"),
        (15, "progress"),
    ]
    assert [msgspec.json.decode(e.data) for e in events if e.name == "log"] == ["7", "8", "9", "10", "11"]
    assert [e.number for e in ledger.events("a", 13)] == [14, 15]
    assert [e.number for e in ledger.events("b", 0)] == [1]


def test_old_finished_jobs_go_with_their_events_and_unfinished_ones_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.save(record("going"))
    for n in range(6):
        ledger.save(record(f"j{n}", "done", finished=100.0 + n))
        ledger.tell(f"j{n}", "note", [b"1"])
    assert ledger.prune(most=4, oldest=103.0) == ["j0", "j1", "j2"]
    assert [one.job.id for one in ledger.load()] == ["going", "j3", "j4", "j5"]
    assert ledger.events("j0", 0) == []
    assert len(ledger.events("j3", 0)) == 1


@pytest.mark.parametrize("content", [b"", b"no database at all", b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_no_list_of_jobs_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(content)
    ledger = Ledger(tmp_path)
    assert ledger.load() == []
    ledger.save(record("a"))
    assert ledger.load() == [record("a")]


def test_a_list_of_another_version_is_set_aside_and_kept(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    ledger = Ledger(tmp_path)
    assert ledger.load() == []
    assert [path.name[:8] for path in tmp_path.glob("damaged*")] == ["damaged-"]


def test_what_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"not a directory|file exists"):
        Ledger(tmp_path / "file" / "jobs").save(record("a"))
    ledger = Ledger(tmp_path)
    ledger.save(record("a"))
    ledger._open().execute("PRAGMA query_only = 1")
    with pytest.raises(LedgerError, match="readonly"):
        ledger.save(record("b"))


def test_a_progress_file_that_cannot_be_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache became read-only while the server ran."""
    ledger = Ledger(tmp_path)
    ledger.save(record("a", "done", 1.0))
    ledger.progress("a").write_text("{}")

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        ledger.remove_progress("a")
        ledger.remove("a")
    assert ledger.find("a") is None
    ledger.remove_progress("a")
    assert not ledger.progress("a").exists()
    ledger.close()
