"""Disks that are full, fail or garble: a build fails clearly or ends well; what is damaged is not served."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.errors import DamagedVariant
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from tests.faults.servers import REPO, amount, serving, told, until
from tests.quant.checkpoints import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be preloaded, which lets writes fail."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("there is no C compiler")
    source, library = Path(__file__).parent / "writing" / "writing.c", tmp_path_factory.mktemp("c") / "w.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def failing_builds(model: Path, error: str, points: str, every: int, **environ: str) -> tuple[int, int]:
    """How many failed by a clear error, and how many ended well although something failed."""
    caches = str(model.parent / "caches")
    command = [sys.executable, "-m", "tests.faults.disk", str(model), caches, error, points, str(every)]
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed, well = map(int, done.stdout.split())
    told(f"R12 {error}: {failed + well} {points} of a build, {failed} failed clearly, {well} ended well")
    return failed, well


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_from_any_operation_on(model: Path, error: str) -> None:
    """R12: the build fails, leaves nothing, and ends well once there is room; what is published stays."""
    every = amount(short=2, full=1)
    failed, well = failing_builds(model, error, "operations", every)
    assert failed >= 40 // every
    assert well <= 2  # the syncs after the variant has its name


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO"])
def test_any_write_that_fails(model: Path, writing: Path, error: str) -> None:
    """R12: Python's and llama.cpp's, each once; nothing but what remembers digests may shrug it off."""
    every = amount(short=8, full=1)
    failed, well = failing_builds(model, error, "writes", every, LD_PRELOAD=str(writing))
    assert failed >= 40 // every
    assert well <= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    place = tmp_path / "run" / "cache"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_at_once_and_the_server_goes_on(small_disk: Path, model: Path) -> None:
    """R12: 507 where it is full before the build begins; the old variant serves on."""
    text = f"models:\n  m: {{source: {model}, variants: [f16], context: 64, parallel: 1, threads: 1}}\n"
    ask = {"model": "m", "prompt": [5], "max_tokens": 1}
    with serving(small_disk.parent, text) as server:
        assert server.post("/v1/completions", ask).status_code == 200
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - (100 << 10)))
        refused = server.post("/quantize", {"model": "m", "recipe": "f32"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
        assert server.post("/v1/completions", ask).status_code == 200
        assert server.http.get("/ready").status_code == 200
        (small_disk / "filler").unlink()
        id = server.post("/quantize", {"model": "m", "recipe": "bf16"}).json()["id"]
        until(lambda: server.http.get(f"/quantize/{id}").json()["state"] == "done", 60)


def test_a_garbled_variant_is_never_accepted(tmp_path: Path, model: Path) -> None:
    """R14: one byte of any file, anywhere; the manifest included."""
    count = amount(short=60, full=1000)
    store, rng = VariantStore(tmp_path / "cache"), random.Random(14)
    source = open_source(str(model), cache=tmp_path / "cache")
    variant = build_variant(source, parse_recipe("f16"), store, progress=ignore, threads=1).variant
    files = [variant.path / file.path for file in variant.manifest.files] + [variant.path / "manifest.json"]
    for _ in range(count):
        path = rng.choice(files)
        original = path.read_bytes()
        at = rng.randrange(len(original))
        path.write_bytes(original[:at] + bytes([original[at] ^ (1 << rng.randrange(8))]) + original[at + 1 :])
        if path.name == "manifest.json":
            _manifest_is_harmless(store, variant.key, original)
        else:
            with pytest.raises(DamagedVariant):
                store.ensure_intact(variant.key)
        path.write_bytes(original)
    store.ensure_intact(variant.key)
    told(f"R14: {count} flipped bits, none accepted")


def _manifest_is_harmless(store: VariantStore, key: str, original: bytes) -> None:
    """A flipped bit of the manifest is noticed, or changes only what it says about itself, not the files."""
    try:
        found = store.ensure_intact(key)
    except DamagedVariant:
        return
    before = {file["path"]: file["sha256"] for file in json.loads(original)["files"]}
    assert {file.path: file.sha256 for file in found.manifest.files} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "control"),
    [("q8_0", ()), ("nf4", ()), ("q8_0", ("nosync",))],
    ids=["gguf", "torch", "control"],
)
def test_a_power_cut_at_any_moment_of_a_build(
    tmp_path: Path, model: Path, recipe: str, control: tuple[str, ...]
) -> None:
    """R11: whatever was not synced is lost or garbled; a disk that syncs nothing is the positive control."""
    short = 12 if recipe == "q8_0" else 200
    every = "1000000" if control else str(amount(short=short, full=1))
    arguments = [str(model), recipe, str(tmp_path / "disks"), every, *control]
    command = [sys.executable, "-m", "tests.faults.power", *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    moments, disks, wrong, lost = map(int, done.stdout.split())
    assert moments > 40
    assert disks == 12 * moments
    if control:
        assert wrong > 0
        assert lost > 0
    else:
        told(
            f"R11 {recipe}: {disks} disks, a power cut at {moments} moments of a build, {wrong} of them wrong"
        )
        assert (wrong, lost) == (0, 0)


@pytest.mark.slow
def test_many_builders_build_once_and_a_killed_one_blocks_nobody(tmp_path: Path, model: Path) -> None:
    """R13: two or eight of them; in half of the rounds the holder of the lock is killed."""
    rounds = amount(short=8, full=100)
    command = [
        sys.executable,
        "-m",
        "tests.faults.builders",
        str(model),
        str(tmp_path / "caches"),
        str(rounds),
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, slowest = done.stdout.split()
    told(
        f"R13: {rounds} rounds of two or eight builders, {killed} holders killed, at most {slowest} s a round"
    )
    assert int(killed) >= rounds // 4
