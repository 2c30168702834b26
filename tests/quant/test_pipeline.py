"""From a source to a variant: once for everybody, refused before it writes, and nothing left by an error."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.errors import (
    BadRecipe,
    BadSource,
    BuildFailed,
    Cancelled,
    DiskFull,
    QuantError,
    UnsupportedArchitecture,
)
from quant.gguf.header import read_header
from quant.pipeline import Outcome, build_variant, require_room, variant_key
from quant.plan import base_type, sizes
from quant.progress import Progress, Report, ignore
from quant.recipe import GGUF_PRESETS, parse_recipe
from quant.safetensors_header import read_header as read_safetensors
from quant.source import open_source
from quant.store import VariantStore
from tests.quant.checkpoints import TEMPLATE, config_of, write_checkpoint, write_json
from tests.quant.variants import KEYS, files_in, publish

ROOT = Path(__file__).parents[2]
BUILDER = """
import sys
from pathlib import Path
from quant.pipeline import build_variant
from quant.recipe import GGUF_PRESETS, parse_recipe
from quant.source import open_source
from quant.store import VariantStore

def report(progress):
    print(progress.stage, flush=True)

cache, model = Path(sys.argv[1]), sys.argv[2]
source = open_source(model, cache=cache)
print("ready", flush=True)
sys.stdin.readline()
print(build_variant(source, parse_recipe("q4_k_m"), VariantStore(cache), progress=report).outcome)
"""
Builder = subprocess.Popen[str]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def build(model: Path, recipe: str, cache: Path, report: Report = ignore) -> Outcome:
    source = open_source(str(model), cache=cache)
    return build_variant(source, parse_recipe(recipe), VariantStore(cache), progress=report)


def left(cache: Path) -> list[str]:
    """All but the memo of digests."""
    return [name for name in files_in(cache) if name != "digests.json"]


def test_a_variant_has_all_that_a_server_needs(model: Path, cache: Path) -> None:
    seen: list[Progress] = []
    outcome = build(model, "q8_0", cache, seen.append)
    variant = outcome.variant
    assert outcome.outcome == "built"
    names = {"model.gguf", "tokenizer.json", "chat_template.jinja", "text.json"}
    assert {file.path for file in variant.manifest.files} == names
    assert {path.name for path in variant.path.iterdir()} == names | {"manifest.json", "build.json"}
    assert read_header(variant.path / "model.gguf").file_type == "q8_0"
    assert variant.manifest.bits_per_weight == pytest.approx(8.6, abs=0.2)
    assert variant.manifest.bytes == sum(file.size for file in variant.manifest.files)
    assert (variant.path / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (variant.path / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((variant.path / "text.json").read_text()) == {
        "bos": 0,
        "eos": 2,
        "end_ids": [0, 2],
        "add_bos": False,
        "context": 128,
        "sampling": {"temperature": 0.7, "top_k": 40},
    }
    assert json.loads((variant.path / "build.json").read_text())["outcome"] == "built"
    stages = list(dict.fromkeys(one.stage for one in seen))
    assert stages == ["convert", "check", "quantize", "publish"]
    assert all(0 <= one.done <= one.total for one in seen)


def test_a_second_build_builds_nothing_and_adds_no_file(model: Path, cache: Path) -> None:
    first = build(model, "q4_0", cache)
    before = files_in(cache), (cache / "digests.json").stat()

    def never(progress: Progress) -> None:
        raise AssertionError(progress)

    second = build(model, "q4_0", cache, never)
    assert (second.outcome, second.variant) == ("cached", first.variant)
    assert (files_in(cache), (cache / "digests.json").stat()) == before


def test_two_builds_are_equal_byte_by_byte(model: Path, tmp_path: Path) -> None:
    one, two = (build(model, "q4_k_m", tmp_path / name).variant for name in "ab")
    assert (one.path / "manifest.json").read_bytes() == (two.path / "manifest.json").read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_types_hold_the_sources_numbers(tmp_path: Path, cache: Path, dtype: str) -> None:
    model = write_checkpoint(tmp_path / dtype, dtype=dtype)
    variant = build(model, dtype.lower(), cache).variant
    header = read_header(variant.path / "model.gguf")
    assert header.file_type == dtype.lower()
    assert base_type(read_safetensors(model / "model.safetensors")) == dtype.lower()
    table = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    stored = next(one for one in read_safetensors(model / "model.safetensors") if "embed" in one.name)
    ours = (variant.path / "model.gguf").read_bytes()[table.start : table.end]
    assert ours == stored.file.read_bytes()[stored.start : stored.end]


def test_another_recipe_is_another_variant(model: Path, cache: Path) -> None:
    keys = {build(model, recipe, cache).variant.key for recipe in ("q4_0", "q8_0", "f16")}
    assert len(keys) == 3
    assert {variant.key for variant in VariantStore(cache).list()} == keys


def test_the_estimate_of_room_is_enough(model: Path, cache: Path) -> None:
    source = open_source(str(model), cache=cache)
    for recipe in ("f32", "f16", "q8_0", "q6_k", "q4_k_m", "q2_k", "tq1_0", "iq4_nl"):
        needed = sizes(source, GGUF_PRESETS[recipe])
        built = build(model, recipe, cache).variant.path / "model.gguf"
        header = (needed.texts + 65536) if recipe != "f32" else 1 << 20
        assert built.stat().st_size <= needed.model + header


def test_a_float_gguf_file_is_quantized_again(model: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(build(model, "f16", cache).variant.path / "model.gguf", tmp_path / "m.gguf")
    variant = build(tmp_path / "m.gguf", "q4_0", cache).variant
    assert [file.path for file in variant.manifest.files] == ["model.gguf"]
    assert read_header(variant.path / "model.gguf").file_type == "q4_0"


def test_a_gguf_file_that_is_small_already_is_served_as_it_is(
    model: Path, cache: Path, tmp_path: Path
) -> None:
    shutil.copy(build(model, "q4_0", cache).variant.path / "model.gguf", tmp_path / "m.gguf")
    for recipe in ("q8_0", "q4_0"):
        with pytest.raises(BadRecipe, match="is q4_0 already"):
            build(tmp_path / "m.gguf", recipe, tmp_path / "fresh")
    assert left(tmp_path / "fresh") == []


def unknown_architecture(model: Path) -> None:
    write_json(model / "config.json", {**config_of(64, 2), "architectures": ["MambaForCausalLM"]})


def wrong_shape(model: Path) -> None:
    write_json(model / "config.json", config_of(32, 2))


@pytest.mark.parametrize(
    ("spoil", "error", "what"),
    [
        (unknown_architecture, UnsupportedArchitecture, "MambaForCausalLM"),
        (wrong_shape, BadSource, "embed_tokens"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    model: Path, cache: Path, spoil: Callable[[Path], None], error: type[QuantError], what: str
) -> None:
    spoil(model)
    seen: list[Progress] = []
    with pytest.raises(error, match=what):
        build(model, "q4_k_m", cache, seen.append)
    assert [one for one in seen if one.stage != "pull"] == []
    assert left(cache) == []
    assert not (cache / "scratch").exists()


@pytest.mark.parametrize("stage", ["convert", "check", "quantize", "publish"])
@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (Cancelled("stop"), Cancelled),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), BuildFailed),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_an_error_at_any_stage_leaves_nothing(
    model: Path, cache: Path, stage: str, error: Exception, becomes: type[Exception]
) -> None:
    other = build(model, "q8_0", cache).variant

    def fail(progress: Progress) -> None:
        if progress.stage == stage:
            raise error

    with pytest.raises(becomes):
        build(model, "q4_0", cache, fail)
    assert all(name.startswith(f"variants/{other.key}/") for name in left(cache))
    VariantStore(cache).verify(other.key)
    assert build(model, "q4_0", cache).outcome == "built"


@pytest.mark.parametrize("stage", ["convert", "check", "quantize", "publish"])
def test_an_interrupt_leaves_what_the_next_build_resumes(model: Path, cache: Path, stage: str) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, "q4_0", cache, interrupt)
    (unfinished,) = VariantStore(cache).unfinished()
    seen: list[Progress] = []
    outcome = build(model, "q4_0", cache, seen.append)
    assert (outcome.outcome, outcome.variant.key) == ("built", unfinished.key)
    assert ("convert" in {one.stage for one in seen}) == (stage == "convert")
    assert ("quantize" in {one.stage for one in seen}) == (stage != "publish")
    assert json.loads((outcome.variant.path / "build.json").read_text())["resumed"] == (stage != "convert")
    assert VariantStore(cache).unfinished() == ()


def test_a_source_that_changes_during_the_build_is_refused(model: Path, cache: Path) -> None:
    def change(progress: Progress) -> None:
        if progress.stage == "quantize":
            write_json(model / "generation_config.json", {"eos_token_id": 1})

    with pytest.raises(BadSource, match="changed while"):
        build(model, "q4_0", cache, change)
    assert left(cache) == []


def test_no_room_is_said_before_anything_is_written(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe, store = open_source(str(model), cache=cache), parse_recipe("q4_k_m"), VariantStore(cache)
    require_room(source, recipe, store)
    monkeypatch.setattr(VariantStore, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull, match="1,000 are free"):
        require_room(source, recipe, store)
    with pytest.raises(DiskFull):
        build_variant(source, recipe, store, progress=ignore)
    assert left(cache) == []


def test_what_is_in_quarantine_makes_room_for_a_build(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe, store = open_source(str(model), cache=cache), parse_recipe("q4_k_m"), VariantStore(cache)
    store.quarantine(publish(store, KEYS[0]).key)
    monkeypatch.setattr(VariantStore, "free_bytes", lambda self: 10**3 if self.quarantined() else 10**9)
    require_room(source, recipe, store)
    assert store.quarantined() == ()


def start(cache: Path, model: Path) -> Builder:
    command = [sys.executable, "-c", BUILDER, str(cache), str(model)]
    builder = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert builder.stdout
    while (line := builder.stdout.readline()) != "ready\n":
        assert line, builder.communicate()
    return builder


def go(builder: Builder) -> None:
    assert builder.stdin
    builder.stdin.write("\n")
    builder.stdin.flush()


def outcome_of(builder: Builder) -> str:
    out, err = builder.communicate(timeout=120)
    assert builder.returncode == 0, err
    return out.splitlines()[-1]


def test_eight_processes_build_once(model: Path, cache: Path) -> None:
    builders = [start(cache, model) for _ in range(8)]
    for builder in builders:
        go(builder)
    assert sorted(map(outcome_of, builders)) == ["built"] + ["cached"] * 7
    (variant,) = VariantStore(cache).list()
    VariantStore(cache).verify(variant.key)
    assert all(name.startswith(f"variants/{variant.key}/") for name in left(cache))
    assert list((cache / "locks").iterdir()) == []


def test_a_killed_builder_is_replaced_by_one_of_those_who_wait(model: Path, cache: Path) -> None:
    first, *others = [start(cache, model) for _ in range(4)]
    go(first)
    assert first.stdout
    while first.stdout.readline() not in {"check\n", ""}:
        pass
    for other in others:
        go(other)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert sorted(map(outcome_of, others)) == ["built", "cached", "cached"]
    (variant,) = VariantStore(cache).list()
    assert all(name.startswith(f"variants/{variant.key}/") for name in left(cache))


ON_A_SMALL_DISK = """
import json, os, sys
from pathlib import Path
from quant.errors import QuantError
from quant.pipeline import build_variant
from quant.recipe import GGUF_PRESETS, parse_recipe
from quant.source import open_source
from quant.store import VariantStore

disk, model, stage = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cache, store = disk / "cache", VariantStore(disk / "cache")
source = open_source(model, cache=cache)
old = build_variant(source, parse_recipe("q8_0"), store, progress=lambda _: None).variant

def fill(progress):
    if progress.stage == stage:
        with open(disk / "filler", "ab", buffering=0) as filler:
            try:
                while filler.write(b"x" * 4096):
                    pass
            except OSError:
                pass

code = "none"
try:
    build_variant(source, parse_recipe("q4_k_m"), store, progress=fill)
except QuantError as error:
    code = error.code
store.verify(old.key)
left = [str(path) for path in cache.rglob("*") if path.is_file() and old.key not in str(path)]
(disk / "filler").unlink()
again = build_variant(source, parse_recipe("q4_k_m"), store, progress=lambda _: None).outcome
print(json.dumps([code, [Path(name).name for name in left], again]))
"""


@pytest.mark.parametrize("stage", ["convert", "quantize", "publish"])
def test_a_disk_that_fills_up_at_any_stage(model: Path, tmp_path: Path, stage: str) -> None:
    """A real file system of 16 MiB, mounted in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=16m none {disk} && exec {sys.executable} -c "$0" {disk} {model} {stage}'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    allowed = subprocess.run([*inside, f"mount -t tmpfs none {disk}"], check=False, capture_output=True)
    if allowed.returncode:
        pytest.skip("file systems cannot be mounted here")
    ended = subprocess.run(
        [*inside, mount, ON_A_SMALL_DISK], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout) == ["disk_full", ["digests.json"], "built"]


def test_the_key_is_of_the_content_and_the_recipe(model: Path, cache: Path, tmp_path: Path) -> None:
    same = write_checkpoint(tmp_path / "other place")
    other = write_checkpoint(tmp_path / "other content", seed=1)

    def key(folder: Path, recipe: str) -> str:
        return variant_key(open_source(str(folder), cache=cache), parse_recipe(recipe))

    assert key(model, "q4_0") == key(same, "q4_0")
    assert len({key(model, "q4_0"), key(model, "q4_1"), key(other, "q4_0")}) == 3
