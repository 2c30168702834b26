"""What goes wrong with background work in other servers, one test each, against whole servers.

Progress that exists only while somebody watches; files loaded whole into memory; work lost at a restart;
downloads repeated for each job; the same work done twice.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quant.manifest import read_manifest
from quant.store import VariantStore
from tests.faults.servers import TINY, Server, amount, resident, serving, until
from tests.quant.checkpoints import write_checkpoint
from tests.quant.hub_server import FakeHub, serve

FINAL = ("done", "failed", "cancelled")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    model = write_checkpoint(tmp_path / "remote", hidden=512, layers=4, dtype="F32", shards=3)
    with serve({"org/model": model}) as running:
        yield running


def models(*folders: Path) -> str:
    lines = [f"  m{number}: {{source: {path}}}" for number, path in enumerate(folders)]
    hub = "  far: {source: org/model, variants: [q8_0, q6_k]}"
    return "\n".join(["models:", *lines, hub, ""])


def environ(tmp_path: Path, hub: FakeHub) -> dict[str, str]:
    # the hub's own client, without the transport that this small hub does not speak
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}


def job(server: Server, id: str) -> Any:
    return server.http.get(f"/quantize/{id}").json()


def finished(server: Server, id: str, seconds: float = 120) -> Any:
    until(lambda: job(server, id)["state"] in FINAL, seconds)
    return job(server, id)


def events(server: Server, id: str, last: int | None = None) -> list[tuple[int, str, Any]]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    text = server.http.get(f"/quantize/{id}/events", headers=headers).text
    found = []
    for block in (block for block in text.split("\n\n") if block and not block.startswith(":")):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def quantize(server: Server, model: str, recipe: str, **fields: object) -> str:
    answer = server.post("/quantize", {"model": model, "recipe": recipe, **fields})
    assert answer.status_code == 202, answer.text
    id: str = answer.json()["id"]
    return id


def test_progress_is_kept_while_nobody_watches_and_told_from_any_point_on(
    tmp_path: Path, hub: FakeHub
) -> None:
    with serving(tmp_path, models(TINY), **environ(tmp_path, hub)) as server:
        id = quantize(server, "m0", "q6_k")
        time.sleep(0.3)
        until(lambda: not server.children(), 60)  # nobody asked for anything meanwhile
        story = events(server, id)
        assert [name for _, name, _ in story if name == "state"] == ["state"] * 3
        assert [data["state"] for _, name, data in story if name == "state"] == ["queued", "running", "done"]
        stages = {data["stage"] for _, name, data in story if name == "progress"}
        assert stages <= {"pull", "convert", "check", "quantize", "publish"}
        assert len(stages) >= 2  # a stage of a small model may be over between two looks at its report
        assert [number for number, _, _ in story] == list(range(1, len(story) + 1))
        for last in (0, 1, len(story) - 1):
            assert events(server, id, last) == story[last:]
        answer = server.http.get(f"/quantize/{id}/events", headers={"Last-Event-ID": str(len(story))})
        assert (answer.status_code, answer.content) == (204, b"")
        server.kill()
        server.start()
        assert events(server, id) == story
        assert "/" not in "".join(str(data) for _, name, data in story if name == "progress")
        assert server.http.delete(f"/quantize/{id}").json()["state"] == "done"  # forgotten
        assert server.http.get(f"/quantize/{id}").status_code == 404


def test_one_download_for_all_jobs_of_a_source_and_one_job_for_the_same_work(
    tmp_path: Path, hub: FakeHub
) -> None:
    hub.pause_s = 0.002
    with serving(tmp_path, models(), QUANTSERVE_JOBS_AT_ONCE="2", **environ(tmp_path, hub)) as server:
        ids = [quantize(server, "far", recipe) for recipe in ("q8_0", "q6_k", "q8_0", "q6_k")]
        assert len(set(ids)) == 2
        pulls = {server.post("/admin/pull", {"model": "far"}).json()["id"] for _ in range(3)}
        assert len(pulls) == 1
        for id in (*ids, *pulls):
            done = finished(server, id)
            assert (done["state"], done["error"]) == ("done", None)
    shards = [name for name in hub.downloads if name.endswith(".safetensors")]
    assert len(shards) == len(set(shards)) == 3


def test_cancelling_the_last_build_stops_its_download(tmp_path: Path, hub: FakeHub) -> None:
    hub.pause_s = 0.2
    with serving(tmp_path, models(), **environ(tmp_path, hub)) as server:
        first, second = quantize(server, "far", "q8_0"), quantize(server, "far", "q6_k")
        until(lambda: len(server.children()) == 1, 20)
        [pull] = [one for one in server.http.get("/quantize").json()["data"] if one["kind"] == "pull"]
        assert server.http.delete(f"/quantize/{first}").json()["state"] == "cancelled"
        assert job(server, pull["id"])["state"] == "running"
        assert server.http.delete(f"/quantize/{second}").json()["state"] == "cancelled"
        assert job(server, pull["id"])["state"] == "cancelled"
        assert server.children() == []


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    """160 MB are fetched, hashed and checked in less memory than that."""
    folder = write_checkpoint(tmp_path / "remote", layers=1)
    save_file({"large": np.zeros((40, 1 << 20), np.float32)}, folder / "model.safetensors")
    with serve({"org/model": folder}) as hub:
        hub.pause_s = 0.0002
        with serving(tmp_path / "run", models(), **environ(tmp_path, hub)) as server:
            id = server.post("/admin/pull", {"model": "far"}).json()["id"]
            most = 0
            while job(server, id)["state"] not in FINAL:
                for pid in server.children():
                    try:
                        most = max(most, resident(pid, "VmHWM"))
                    except (AssertionError, OSError):  # it has just ended
                        continue
                time.sleep(0.05)
            assert job(server, id)["state"] == "done", job(server, id)
            assert 0 < most < 130 << 20
            assert server.memory() < 130 << 20


def contents(cache: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file of every variant, the manifest's own included, by key."""
    found = {}
    for variant in VariantStore(cache).list():
        VariantStore(cache).verify(variant.key)
        manifest = hashlib.sha256((variant.path / "manifest.json").read_bytes()).hexdigest()
        files = {file.path: file.sha256 for file in read_manifest(variant.path).files}
        found[variant.key] = {**files, "manifest.json": manifest}
    return found


def pulled(home: Path, remote: Path) -> bool:
    """Whether the snapshot's weights and texts are those of the hub, byte for byte."""
    [snapshot] = (home / "hub" / "models--org--model" / "snapshots").iterdir()
    names = [path.name for path in remote.iterdir() if path.suffix in {".safetensors", ".json"}]
    return all((snapshot / name).read_bytes() == (remote / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_killed_server_goes_on_with_two_builds_and_a_pull(tmp_path: Path, hub: FakeHub) -> None:
    """The hub breaks a third of its answers off; the server is killed at random moments of the work."""
    rng = random.Random(8)
    second = write_checkpoint(tmp_path / "second", hidden=512, layers=3, dtype="F32")
    text = models(TINY, second)
    more = {"QUANTSERVE_JOBS_AT_ONCE": "2"}
    with serving(tmp_path / "calm", text, **more, **environ(tmp_path / "calm", hub)) as server:
        for id in [quantize(server, "m0", "q6_k"), quantize(server, "m1", "q4_k_m")]:
            assert finished(server, id)["state"] == "done"
    expected = contents(tmp_path / "calm" / "cache")
    assert len(expected) == 2
    hub.breaks, hub.pause_s = lambda: rng.random() < 0.33, 0.02
    for number in range(amount(short=1, full=10)):
        place = tmp_path / str(number)
        server = Server(place, text, **more, **environ(place, hub)).start()
        try:
            ids = [quantize(server, "m0", "q6_k"), quantize(server, "m1", "q4_k_m")]
            ids.append(server.post("/admin/pull", {"model": "far"}).json()["id"])
            until(lambda ids=ids, server=server: all(job(server, id)["progress"] for id in ids), 30)  # type: ignore[misc]
            for _ in range(rng.choice((1, 2, 3))):
                time.sleep(rng.uniform(0, 0.8))
                server.kill()
                server.start()
            for id in ids:
                ended = finished(server, id)
                assert (ended["state"], ended["error"]) == ("done", None)
        finally:
            server.close()
        assert contents(place / "cache") == expected
        assert VariantStore(place / "cache").unfinished() == ()
        assert pulled(place / "hf", tmp_path / "remote")
