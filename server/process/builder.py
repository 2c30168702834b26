"""`python -m server.process.builder`: one build or pull, one process.

It may be killed at any moment: the next build of the same key resumes what lies in its scratch. It ends with
its parent, computes at low priority and within a limit of memory, and says how far it is in a progress file.
"""

import argparse
import contextlib
import errno
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from quant.errors import BuildFailed, DiskFull, DownloadBroken, QuantError
from quant.pipeline import Progress, build_variant, require_headers, variant_key
from quant.progress import Detail
from quant.recipe import parse_recipe
from quant.source import Source, open_source
from quant.store import VariantStore
from server.backends.llama.threads import limit_spinning
from server.errors import ServerError
from server.process.child import die_with
from server.process.memory import build_memory
from server.process.reports import BuildAnswer, BuildReport, Problem, replace_json

Result = TypeVar("Result")
REPORT_EVERY_S = 0.2
MOST_NOTES = 100
PULL_PAUSES_S = (0.5, 1, 2, 4, 8, 8, 8, 8, 8)  # between attempts of one job


class Reporter:
    """Replaces the progress file at most five times a second, and at once when the stage changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._report = BuildReport()
        self._due = 0.0

    def progress(self, step: Progress) -> None:
        changed = step.stage != self._report.stage
        told = _told(step.detail) if step.detail else {}
        self._report = replace(
            self._report, stage=step.stage, done=step.done, total=step.total, unit=step.unit, **told
        )
        if note := step.detail and _note(step.detail):
            self._report = replace(self._report, notes=(*self._report.notes, note)[-MOST_NOTES:])
        if changed or time.monotonic() >= self._due:
            self._write()

    def variant(self, key: str) -> None:
        self._report = replace(self._report, variant=key)
        self._write()

    def note(self, text: str) -> None:
        self._report = replace(self._report, notes=(*self._report.notes, text)[-MOST_NOTES:])
        self._write()

    def end(self, error: Problem | None) -> None:
        self._report = replace(self._report, state="failed" if error else "done", error=error)
        self._write()

    def _write(self) -> None:
        self._due = time.monotonic() + REPORT_EVERY_S
        with contextlib.suppress(OSError):  # a full disk must not end a build that may still fit
            replace_json(self._path, self._report)


def _told(detail: Detail) -> dict[str, Any]:
    """Fields of the report that follow from what was just done."""
    if detail.eta_s is not None:
        memory = f", {detail.memory_bytes / 1e9:.2f} GB of memory" if detail.memory_bytes else ""
        return {"eta_s": detail.eta_s, "last": f"block of {(detail.bytes or 0) / 1e6:.1f} MB{memory}"}
    if detail.module is None:
        return {}
    loss = "" if detail.loss is None else f", output error {detail.loss:.3g}"
    rtn = f" (round-to-nearest {detail.rtn_loss:.3g})" if loss and detail.rtn_loss is not None else ""
    return {"last": f"{detail.module} by {detail.method}{loss}{rtn}"}


def _note(detail: Detail) -> str | None:
    if detail.fallback:
        return f"{detail.module}: {detail.method} was used, since {detail.fallback}"
    return detail.note


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    answers = take_stdout()
    die_with(options.parent)
    _limit(options.memory_limit)
    limit_spinning()
    reporter = Reporter(options.progress)
    answer = _answer(options, reporter)
    reporter.end(answer.error)
    os.write(answers, msgspec.json.encode(answer) + b"\n")
    return 1 if answer.error else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.process.builder", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--source", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--revision")
    parser.add_argument("--recipe", type=json.loads, help="name or fields, as JSON; without: only pull")
    parser.add_argument("--local-only", choices=["0", "1"], default="0", help="1: the source is not pulled")
    parser.add_argument("--progress", type=Path, required=True, help="file to keep replacing")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process does")
    parser.add_argument("--memory-limit", type=int, default=None, help="bytes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cache-max-bytes", type=int, default=None)
    return parser.parse_args(arguments)


def take_stdout() -> int:
    """Keep standard output for the last line: what libraries print goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _limit(memory_limit: int | None) -> None:
    limit = memory_limit or build_memory()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)  # requests that are being answered come first


def _answer(options: argparse.Namespace, reporter: Reporter) -> BuildAnswer:
    work = _build if options.recipe else _pull
    answer = guarded(lambda: work(options, reporter), BuildFailed.code, "the build")
    return BuildAnswer(error=answer) if isinstance(answer, Problem) else answer


def guarded(work: Callable[[], Result], code: str, what: str) -> Result | Problem:
    """The result, or what went wrong in words for those who wait; `code` where nobody meant to raise it."""
    try:
        return work()
    except (QuantError, ServerError) as error:
        return Problem(error.code, str(error))
    except MemoryError:
        return Problem(code, f"{what} needs more memory than it may have")
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return Problem(DiskFull.code, "the disk is full")
        return Problem(code, f"{what} failed: {error.strerror or type(error).__name__}")
    except Exception as error:  # noqa: BLE001  a bug must reach the one who waits, too
        traceback.print_exc()
        return Problem(code, f"{what} failed ({type(error).__name__})")


def _build(options: argparse.Namespace, reporter: Reporter) -> BuildAnswer:
    recipe = parse_recipe(options.recipe, local=True)
    source = _source(options, reporter, lambda found: require_headers(found, recipe))
    reporter.variant(variant_key(source, recipe))
    store = VariantStore(options.cache, max_bytes=options.cache_max_bytes)
    outcome = build_variant(source, recipe, store, progress=reporter.progress, device=options.device)
    variant = outcome.variant
    return BuildAnswer(outcome=outcome.outcome, key=variant.key, variant=str(variant.path))


def _pull(options: argparse.Namespace, reporter: Reporter) -> BuildAnswer:
    """Connections may break: what has arrived is kept, and the rest is asked for again, for a while."""
    for pause_s in PULL_PAUSES_S:
        try:
            return _pulled(_source(options, reporter))
        except DownloadBroken as error:
            reporter.note(f"{error}; trying again in {pause_s} s")
            time.sleep(pause_s)
    return _pulled(_source(options, reporter))


def _pulled(source: Source) -> BuildAnswer:
    return BuildAnswer(outcome="pulled", key=source.digest)


def _source(
    options: argparse.Namespace, reporter: Reporter, check: Callable[[Source], None] | None = None
) -> Source:
    return open_source(
        options.source,
        cache=options.cache,
        revision=options.revision,
        local_only=options.local_only == "1",
        progress=reporter.progress,
        check=check,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
