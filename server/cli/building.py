"""The builder process as the command line runs it: started, watched through its progress file, ended."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from quant.errors import BuildFailed
from quant.recipe import Recipe
from server.catalog.source import Reference
from server.cli.terminal import Step
from server.process.child import child_environment, describe_exit, python_module
from server.process.reports import BuildAnswer, Problem, read_answer, read_report
from server.settings import Settings

POLL_S = 0.2


class Interrupted(Exception):
    """Ctrl-C. The builder has ended; what lies in scratch under `key` (None: nothing) can be resumed."""

    def __init__(self, key: str | None) -> None:
        super().__init__(key)
        self.key = key


def run_builder(
    settings: Settings,
    source: Reference,
    recipe: Recipe,
    show: Callable[[Step], None],
    *,
    say: Callable[[str], None] = lambda _: None,
    device: str = "auto",
) -> BuildAnswer:
    """Build in a child process, calling `show` as it gets on and `say` with notes. Raises Interrupted.

    The child has a process group of its own: Ctrl-C reaches us alone, and being killed is what the
    builder's journal is made for.
    """
    with tempfile.TemporaryDirectory(prefix="quantserve-") as name:
        folder = Path(name)
        progress = folder / "progress.json"
        command = python_module(
            "server.process.builder", *_arguments(settings, source, recipe, progress), "--device", device
        )
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=child_environment(os.environ, pulls=True),
                process_group=0,
            )
            try:
                watch(child, progress, show, say)
            except KeyboardInterrupt as error:
                report = read_report(progress)
                raise Interrupted(report.variant if report else None) from error
            finally:
                child.kill()
                child.wait()
        return read_answer((folder / "out").read_bytes()) or _died(child.returncode, folder / "err")


def _arguments(settings: Settings, source: Reference, recipe: Recipe, progress: Path) -> list[str]:
    revision = ["--revision", source.revision] if source.revision else []
    most = ["--cache-max-bytes", str(settings.cache_max_bytes)] if settings.cache_max_bytes else []
    return [
        *("--cache", str(settings.cache), "--source", source.source, *revision, *most),
        *("--recipe", json.dumps(recipe.spec), "--progress", str(progress)),
        *("--parent", str(os.getpid())),
    ]


def watch(
    child: "subprocess.Popen[bytes]", progress: Path, show: Callable[[Step], None], say: Callable[[str], None]
) -> None:
    said: set[str] = set()
    ended = False
    while not ended:
        ended = child.poll() is not None  # what it reported last is shown, too
        report = read_report(progress)
        if report and report.stage:
            show(Step(report.stage, report.done, report.total, report.unit, report.eta_s))
        for note in report.notes if report else ():
            if note not in said:
                said.add(note)
                say(note)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL_S)


def _died(returncode: int, errors: Path) -> BuildAnswer:
    """For a builder that ended without a last line; its last words on stderr may say why."""
    said = errors.read_text(errors="replace").strip().splitlines()[-1:]
    reason = ": ".join(["the build process " + describe_exit(returncode), *said])
    return BuildAnswer(error=Problem(BuildFailed.code, reason))
