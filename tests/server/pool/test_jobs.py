"""Real builds of the bundled model in child processes: run, shared, cancelled, resumed, remembered."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from quant.recipe import parse_recipe
from quant.store import VariantStore
from server.catalog import Model
from server.errors import DiskFull, RequestError, ShuttingDown, UnknownJob
from server.pool import builds
from server.pool import jobs as jobs_module
from server.pool.jobs import Job, Jobs
from server.pool.ledger import Ledger
from server.settings import Settings
from tests.server.pool.support import children, files, until

F16 = parse_recipe("f16")
Q6_K = parse_recipe("q6_k")
LEDGER = ("jobs.sqlite3", "jobs.sqlite3-wal", "jobs.sqlite3-shm")


@pytest.fixture
def model(tiny_chat: Path) -> Model:
    return Model(id="tiny-chat", source=str(tiny_chat))


def jobs_of(cache: Path) -> Jobs:
    return Jobs(Settings(cache=cache), VariantStore(cache))


def ledger_files(jobs: Jobs) -> set[str]:
    """While a server runs: the list of jobs, what SQLite keeps beside it, and the server's lock."""
    return {f"jobs/{name}" for name in (*LEDGER, f"{jobs._ledger.me}.server")}


def variant_files(cache: Path) -> set[str]:
    return {name for name in files(cache) if name.startswith("variants/")}


def variants(cache: Path) -> list[str]:
    return [variant.manifest.recipe.name for variant in VariantStore(cache).list()]


async def test_a_job_runs_to_done_and_asking_again_builds_nothing(tmp_path: Path, model: Model) -> None:
    jobs = jobs_of(tmp_path)
    finished: list[Job] = []
    jobs.listeners.append(finished.append)
    job = await jobs.submit(model, F16)
    assert (job.state, job.model, job.variant, job.kind) == ("queued", "tiny-chat", "tiny-chat:f16", "build")
    stages = set()
    while (now := jobs.get(job.id)).state in ("queued", "running"):
        stages.add(now.progress.stage if now.progress else None)
        await asyncio.sleep(0.02)
    assert now.state == "done", now.error
    assert now.outcome == "built"
    assert now.finished is not None
    assert len(stages - {None}) > 0, "no progress was seen on the way"
    assert finished == [now]
    assert variants(tmp_path) == ["f16"]
    before = files(tmp_path)
    assert before == {"digests.json", *ledger_files(jobs), *variant_files(tmp_path)}
    again = await jobs.submit(model, F16)
    assert (again.id, again.state, again.outcome, again.variant) == (job.id, "done", "cached", now.variant)
    assert jobs.get(job.id).outcome == "built"
    assert files(tmp_path) == before
    # a new server knows the job, and adds nothing either
    later = jobs_of(tmp_path)
    await later.start()
    assert later.get(job.id) == now
    assert (await later.submit(model, F16)).outcome == "cached"
    assert await later.wait(job.id) == now
    await later.close()
    assert files(tmp_path) == before
    await jobs.close()


async def test_a_variant_whose_job_is_forgotten_answers_with_a_job_that_is_done(
    tmp_path: Path, model: Model
) -> None:
    jobs = jobs_of(tmp_path)
    job = await jobs.wait((await jobs.submit(model, F16)).id)
    assert (await jobs.remove(job.id)).state == "done"
    await jobs.close()
    fresh = jobs_of(tmp_path)
    first, second = await fresh.submit(model, F16), await fresh.submit(model, F16)
    assert (first.state, first.outcome, first.key) == ("done", "cached", job.key)
    assert first.id != job.id
    assert second == first
    assert variants(tmp_path) == ["f16"]
    await fresh.close()
    assert files(tmp_path) == {"digests.json", "jobs/jobs.sqlite3", *variant_files(tmp_path)}


async def test_the_same_build_is_one_job_and_others_wait_for_their_turn(tmp_path: Path, model: Model) -> None:
    jobs = jobs_of(tmp_path)
    first, same, other = await asyncio.gather(
        jobs.submit(model, F16), jobs.submit(model, F16), jobs.submit(model, parse_recipe("bf16"))
    )
    assert same.id == first.id != other.id
    await until(lambda: jobs.get(first.id).state == "running" or jobs.get(other.id).state == "running", 5)
    assert sorted(job.state for job in jobs.list()) == ["queued", "running"]
    assert len(children()) <= 1
    assert (await jobs.wait(first.id)).outcome == (await jobs.wait(other.id)).outcome == "built"
    assert sorted(variants(tmp_path)) == ["bf16", "f16"]
    await jobs.close()


async def running_build(jobs: Jobs, model: Model) -> str:
    """A job whose builder has begun to write."""
    job = await jobs.submit(model, Q6_K)
    await until(lambda: (now := jobs.get(job.id)).progress is not None and now.key is not None, 20)
    return job.id


async def test_cancelling_a_running_job_stops_it_soon_and_leaves_nothing(
    tmp_path: Path, model: Model
) -> None:
    jobs = jobs_of(tmp_path)
    id = await running_build(jobs, model)
    waiting = asyncio.create_task(jobs.wait(id))
    started = time.monotonic()
    cancelled = await jobs.cancel(id)
    assert time.monotonic() - started < 2
    assert cancelled.state == "cancelled"
    assert (await waiting).state == "cancelled"
    assert children() == []
    assert files(tmp_path) == {"digests.json", *ledger_files(jobs)}
    assert VariantStore(tmp_path).unfinished() == ()
    assert (await jobs.cancel(id)) == cancelled
    # it may be asked for again
    again = await jobs.submit(model, Q6_K)
    assert again.id != id
    await jobs.close()


async def test_cancelling_a_queued_job_never_starts_it(tmp_path: Path, model: Model) -> None:
    jobs = jobs_of(tmp_path)
    first = await jobs.submit(model, F16)
    second = await jobs.submit(model, Q6_K)
    assert (await jobs.cancel(second.id)).state == "cancelled"
    assert (await jobs.wait(first.id)).state == "done"
    assert variants(tmp_path) == ["f16"]


@pytest.mark.parametrize("ticks", [0, 1, 2, 3, 5, 8])
async def test_a_job_cancelled_at_its_start_leaves_no_process(
    tmp_path: Path, model: Model, ticks: int
) -> None:
    jobs = jobs_of(tmp_path)
    job = await jobs.submit(model, F16)
    for _ in range(ticks):
        await asyncio.sleep(0)
    assert (await jobs.cancel(job.id)).state == "cancelled"
    assert children() == []
    assert files(tmp_path) == {"digests.json", *ledger_files(jobs)}


async def test_a_job_that_the_end_of_the_server_interrupts_is_taken_up_again(
    tmp_path: Path, model: Model
) -> None:
    jobs = jobs_of(tmp_path)
    id = await running_build(jobs, model)
    await jobs.close()
    assert children() == []
    assert jobs.get(id).state == "queued"
    with pytest.raises(ShuttingDown):
        await jobs.submit(model, F16)
    later = jobs_of(tmp_path)
    assert later.get(id).state == "queued"
    await later.start()
    await later.start()
    assert (await later.wait(id)).outcome == "built"
    assert VariantStore(tmp_path).unfinished() == ()
    await later.close()


async def test_a_builder_that_is_killed_fails_its_job_and_nothing_else(tmp_path: Path, model: Model) -> None:
    jobs = jobs_of(tmp_path)
    id = await running_build(jobs, model)
    (pid,) = children()
    os.kill(int(pid), signal.SIGKILL)
    job = await jobs.wait(id)
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("build_failed", "the build process was killed by SIGKILL")
    assert (await jobs.submit(model, Q6_K)).id != id
    await jobs.close()


async def test_what_cannot_be_built_is_refused_before_there_is_a_job(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tmp_path / "cache")
    with pytest.raises(RequestError, match="not on this machine any more"):
        await jobs.submit(Model(id="gone", source=str(tmp_path / "gone")), F16)
    monkeypatch.setattr(VariantStore, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull):
        await jobs.submit(model, F16)
    assert jobs.list() == []
    assert not (tmp_path / "cache" / "jobs").exists()


def changed(tiny_chat: Path, folder: Path, **config: object) -> Model:
    folder.mkdir()
    for path in tiny_chat.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **config}))
    return Model(id="m", source=str(folder))


async def test_an_architecture_without_a_row_is_refused_before_there_is_a_job(
    tmp_path: Path, tiny_chat: Path
) -> None:
    jobs = jobs_of(tmp_path / "cache")
    model = changed(tiny_chat, tmp_path / "other", architectures=["NoSuchForCausalLM"])
    with pytest.raises(RequestError, match="NoSuchForCausalLM"):
        await jobs.submit(model, F16)
    assert jobs.list() == []


async def test_a_refusal_of_the_builder_is_the_jobs_error(tmp_path: Path, tiny_chat: Path) -> None:
    jobs = jobs_of(tmp_path / "cache")
    model = changed(tiny_chat, tmp_path / "deeper", num_hidden_layers=13)
    job = await jobs.wait((await jobs.submit(model, F16)).id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error.code == "bad_source"
    assert "layers.12" in job.error.message
    assert VariantStore(tmp_path / "cache").unfinished() == ()


async def test_a_list_of_jobs_that_cannot_be_read_is_set_aside(tmp_path: Path, model: Model) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "jobs.sqlite3").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    jobs = jobs_of(tmp_path)
    await jobs.start()
    assert jobs.list() == []
    [aside] = [path.name for path in folder.iterdir()]
    assert aside.startswith("damaged-")
    for id in ("nope", "../../etc/passwd", aside):
        with pytest.raises(UnknownJob):
            jobs.get(id)
        with pytest.raises(UnknownJob):
            await jobs.cancel(id)
        with pytest.raises(UnknownJob):
            await jobs.wait(id)
    assert (await jobs.wait((await jobs.submit(model, F16)).id)).state == "done"
    await jobs.close()


async def test_old_finished_jobs_are_forgotten(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "KEPT", 3)
    monkeypatch.setattr(builds, "python_module", lambda *_: ["/bin/false"])
    jobs = jobs_of(tmp_path)
    ids = []
    for _ in range(5):
        job = await jobs.wait((await jobs.submit(model, F16)).id)
        assert job.error is not None
        assert job.error.message == "the build process exited with code 1"
        ids.append(job.id)
    assert [job.id for job in jobs.list()] == ids[:1:-1]
    await jobs.close()
    assert {record.job.id for record in Ledger(tmp_path / "jobs").load()} == set(ids[2:])
    with pytest.raises(UnknownJob):
        jobs_of(tmp_path).events(ids[0], 0)


async def test_a_builder_that_cannot_be_started_fails_its_job(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "python_module", lambda *_: [str(tmp_path / "no-such-program")])
    jobs = jobs_of(tmp_path)
    job = await jobs.wait((await jobs.submit(model, F16)).id)
    assert job.error is not None
    assert "No such file" in job.error.message
