"""One build or pull in a child process: started, watched, and ended with whoever waits for it."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quant.errors import BuildFailed
from server.pool.records import JobRecord
from server.pool.watching import Lines, Watch
from server.process.child import child_environment, describe_exit, python_module
from server.process.reports import BuildAnswer, Problem, read_answer, read_report

POLL_S = 0.2
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A child process: a module and its arguments, None for those that are not given."""

    module: str = "server.process.builder"
    options: Mapping[str, object]
    progress: Path
    pulls: bool = False  # from the hub, which may ask for a token

    @property
    def arguments(self) -> list[str]:
        every = {**self.options, "--progress": self.progress, "--parent": os.getpid()}
        return [f"{name}={value}" for name, value in every.items() if value is not None]


def build_order(record: JobRecord, cache: Path, progress: Path, cache_max_bytes: int | None) -> Order:
    """The source is here: a pull comes before it."""
    pulling = pull_order(record, cache, progress).options
    own = {"--recipe": json.dumps(record.recipe), "--local-only": 1, "--cache-max-bytes": cache_max_bytes}
    return Order(options={**pulling, **own}, progress=progress)


def pull_order(record: JobRecord, cache: Path, progress: Path) -> Order:
    """Without a recipe the builder only fetches the source."""
    options = {"--cache": cache, "--source": record.source, "--revision": record.revision}
    return Order(options=options, progress=progress, pulls=True)


def measure_order(record: JobRecord, progress: Path) -> Order:
    options = {"--order": json.dumps(record.spec)}
    return Order(module="server.process.measurer", options=options, progress=progress)


def search_order(record: JobRecord, progress: Path) -> Order:
    options = {"--order": json.dumps(record.spec)}
    return Order(module="server.process.searcher", options=options, progress=progress)


async def run_child(order: Order, watch: Watch) -> BuildAnswer:
    """Returns when the process is gone; cancelling kills it and leaves its scratch to be resumed."""
    starting = asyncio.create_task(_start(order))
    try:
        process = await asyncio.shield(starting)
    except OSError as error:
        return _failed(f"no build process could be started ({error.strerror})")
    except asyncio.CancelledError:  # a process that nobody knows must not stay
        await asyncio.shield(_end(await starting))
        raise
    lines = Lines()
    talking = asyncio.create_task(_listen(process, lines))
    try:
        while not (await asyncio.wait({talking}, timeout=POLL_S))[0]:
            _look(order, watch, lines)
    finally:
        await asyncio.shield(_end(process))
    _look(order, watch, lines)
    answer = read_answer(await talking)
    return answer or _failed(f"the build process {describe_exit(process.returncode)}")


async def _start(order: Order) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *python_module(order.module, *order.arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(os.environ, pulls=order.pulls),
        start_new_session=True,  # a process group of its own, to be killed whole
    )


async def _listen(process: asyncio.subprocess.Process, lines: Lines) -> bytes:
    """All of its standard output, once it has ended; its standard error goes to `lines`."""
    assert process.stdout is not None
    assert process.stderr is not None
    answer = asyncio.create_task(process.stdout.read())
    while data := await process.stderr.read(CHUNK):
        lines.feed(data)
    lines.feed(b"\n")
    await process.wait()
    return await answer


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill and reap."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _look(order: Order, watch: Watch, lines: Lines) -> None:
    if (report := read_report(order.progress)) is not None:
        watch.report(report)
    if said := lines.take():
        watch.said(said)


def _failed(message: str) -> BuildAnswer:
    return BuildAnswer(error=Problem(BuildFailed.code, message))
