"""Build processes: one last line, many at once, killed at any moment, never longer than their parent."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from quant.store import VariantStore
from server.process.reports import BuildAnswer, BuildReport, read_answer, read_report, replace_json
from tests.quant.checkpoints import write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def command(cache: Path, source: Path, recipe: object = "q8_0", *more: str) -> list[str]:
    progress = cache.parent / f"progress-{random.getrandbits(64)}"
    return [
        *(sys.executable, "-m", "server.process.builder", "--cache", str(cache), "--source", str(source)),
        *("--recipe", json.dumps(recipe), "--progress", str(progress), *more),
    ]


def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def finish(process: "subprocess.Popen[bytes]") -> BuildAnswer:
    output, _ = process.communicate(timeout=120)
    assert output.count(b"\n") == 1
    answer = msgspec.json.decode(output, type=BuildAnswer)
    assert process.returncode == (1 if answer.error else 0)
    return answer


def progress_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--progress") + 1])


def test_a_build_ends_with_one_line_and_its_last_progress(tmp_path: Path, source: Path) -> None:
    arguments = command(tmp_path / "cache", source)
    answer = finish(start(arguments))
    (variant,) = VariantStore(tmp_path / "cache").list()
    assert answer == BuildAnswer(outcome="built", key=variant.key, variant=str(variant.path))
    report = read_report(progress_of(arguments))
    assert report is not None
    assert (report.state, report.variant, report.error) == ("done", variant.key, None)
    assert finish(start(arguments)).outcome == "cached"


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        ("no-such", "bad_recipe"),
        ({"type": "q4_0", "what": 1}, "bad_recipe"),
        ({"type": "q4_0", "overrides": [["x", "iq1_s"]]}, "bad_recipe"),
        (7, "build_failed"),
    ],
)
def test_a_refusal_is_an_error_with_a_code_and_leaves_nothing(
    tmp_path: Path, source: Path, recipe: object, code: str
) -> None:
    arguments = command(tmp_path / "cache", source, recipe)
    answer = finish(start(arguments))
    assert answer.error is not None
    assert answer.error.code == code
    report = read_report(progress_of(arguments))
    assert report is not None
    assert (report.state, report.error) == ("failed", answer.error)
    assert VariantStore(tmp_path / "cache").unfinished() == ()


def test_a_missing_source_and_too_little_memory(tmp_path: Path, source: Path) -> None:
    missing = finish(start(command(tmp_path / "cache", tmp_path / "nowhere")))
    assert missing.error is not None
    assert missing.error.code == "bad_source"
    assert str(tmp_path) not in missing.error.message
    process = start(command(tmp_path / "cache", source, "q8_0", "--memory-limit", str(64 << 20)))
    output, _ = process.communicate(timeout=120)
    answer = read_answer(output)
    assert process.returncode != 0
    assert answer is None or answer.error is not None
    assert VariantStore(tmp_path / "cache").list() == []


def test_eight_processes_build_one_variant_once(tmp_path: Path, source: Path) -> None:
    processes = [start(command(tmp_path / "cache", source)) for _ in range(8)]
    outcomes = sorted(str(finish(process).outcome) for process in processes)
    assert outcomes == ["built"] + ["cached"] * 7
    (variant,) = VariantStore(tmp_path / "cache").list()
    assert json.loads((variant.path / "build.json").read_text())["outcome"] == "built"


@pytest.mark.slow
def test_a_builder_killed_at_any_moment_harms_nothing(tmp_path: Path, source: Path) -> None:
    cache, moments = tmp_path / "cache", random.Random(5)
    store = VariantStore(cache)
    began = time.monotonic()
    finish(start(command(tmp_path / "timed", source)))
    whole = time.monotonic() - began
    for _ in range(20):
        process = start(command(cache, source))
        time.sleep(moments.uniform(0.3, 1.1) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
        for variant in store.list():
            store.verify(variant.key)
            store.delete(variant.key)  # so that there is something left to interrupt
    answer = finish(start(command(cache, source)))
    (variant,) = store.list()
    assert variant.key == answer.key
    store.verify(variant.key)
    assert store.unfinished() == ()
    assert [path.name for path in (cache / "locks").iterdir()] == []


def test_a_builder_ends_with_its_parent(tmp_path: Path, tiny_chat: Path) -> None:
    arguments = command(tmp_path / "cache", tiny_chat)
    program = f"""
import os, signal, subprocess, time
builder = subprocess.Popen({arguments!r}, stdout=subprocess.DEVNULL)
while not os.path.exists({str(progress_of(arguments))!r}):
    time.sleep(0.01)
print(builder.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    limit = time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < limit, "the builder outlived its parent"
        time.sleep(0.02)


def test_reports_are_replaced_whole_and_junk_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "report"
    assert read_report(path) is None
    report = BuildReport(stage="convert", done=1, total=2, unit="bytes")
    replace_json(path, report)
    assert read_report(path) == report
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"{")
    assert read_report(path) is None
    with pytest.raises(OSError, match="No such file"):
        replace_json(tmp_path / "no" / "folder", report)


@pytest.mark.parametrize("output", [b"", b"\n", b"Segmentation fault\n", b"{}\n", b'{"outcome":"built"}\n'])
def test_an_output_without_an_answer_is_none(output: bytes) -> None:
    assert read_answer(output) is None


def test_the_answer_is_the_last_line() -> None:
    answer = BuildAnswer(outcome="cached", key="k", variant="v")
    assert read_answer(b"noise\n" + msgspec.json.encode(answer) + b"\n") == answer
