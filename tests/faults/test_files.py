"""Disks that are full, fail or garble: a build fails clearly or ends well; what is damaged is not served."""

import json
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


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_write(tmp_path: Path, model: Path, error: str) -> None:
    """R12: at each of them the build fails, leaves nothing, and ends well once there is room."""
    command = [sys.executable, "-m", "tests.faults.disk", str(model), str(tmp_path / "caches"), error]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told(f"R12 {error}: at each of {done.stdout.strip()} writes of a build")
    assert int(done.stdout) >= 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    place = tmp_path / "run" / "cache"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
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
