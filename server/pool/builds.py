"""One build in a child process: started, watched, and ended with whoever waits for it."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quant.errors import BuildFailed
from quant.recipe import Body
from server.process.child import child_environment, describe_exit, python_module
from server.process.reports import BuildAnswer, BuildReport, Problem, read_answer, read_report

POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    cache: Path
    source: str
    revision: str | None
    recipe: Body
    progress: Path
    cache_max_bytes: int | None = None

    @property
    def arguments(self) -> list[str]:
        pairs = {
            "--cache": str(self.cache),
            "--source": self.source,
            "--revision": self.revision,
            "--recipe": json.dumps(self.recipe),
            "--progress": str(self.progress),
            "--cache-max-bytes": self.cache_max_bytes,
            "--parent": os.getpid(),
        }
        return [f"{name}={value}" for name, value in pairs.items() if value is not None]


async def run_build(order: BuildOrder, watch: Callable[[BuildReport], None]) -> BuildAnswer:
    """Returns when the build process is gone; cancelling kills it and leaves its scratch to be resumed."""
    starting = asyncio.create_task(_start(order))
    try:
        process = await asyncio.shield(starting)
    except OSError as error:
        return _failed(f"no build process could be started ({error.strerror})")
    except asyncio.CancelledError:  # a process that nobody knows must not stay
        await asyncio.shield(_end(await starting))
        raise
    talking = asyncio.create_task(process.communicate())
    try:
        while not (await asyncio.wait({talking}, timeout=POLL_S))[0]:
            _look(order, watch)
    finally:
        await asyncio.shield(_end(process))
    _look(order, watch)
    answer = read_answer((await talking)[0])
    return answer or _failed(f"the build process {describe_exit(process.returncode)}")


async def _start(order: BuildOrder) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *python_module("server.process.builder", *order.arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(os.environ),
        start_new_session=True,  # a process group of its own, to be killed whole
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill and reap."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _look(order: BuildOrder, watch: Callable[[BuildReport], None]) -> None:
    if (report := read_report(order.progress)) is not None:
        watch(report)


def _failed(message: str) -> BuildAnswer:
    return BuildAnswer(error=Problem(BuildFailed.code, message))
