"""A measuring or searching process as the command line runs it: started, watched, ended."""

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from server.cli.building import watch
from server.cli.terminal import Step, stop
from server.process.child import child_environment, describe_exit, python_module
from server.process.reports import BuildAnswer, read_answer


def run_module(
    module: str,
    arguments: tuple[str, ...],
    show: Callable[[Step], None],
    *,
    say: Callable[[str], None],
    interrupted: str,
) -> BuildAnswer | str:
    """Its answer, or why it gave none. Ctrl-C ends it and the command, which then says `interrupted`."""
    with tempfile.TemporaryDirectory(prefix="quantserve-") as name:
        folder = Path(name)
        progress = folder / "progress.json"
        command = python_module(module, *arguments, "--progress", str(progress), "--parent", str(os.getpid()))
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=child_environment(os.environ),
                process_group=0,
            )
            try:
                watch(child, progress, show, say)
            except KeyboardInterrupt:
                stop(interrupted, code=130)
            finally:
                child.kill()
                child.wait()
        answer = read_answer((folder / "out").read_bytes())
        words = (folder / "err").read_text(errors="replace").strip().splitlines()[-1:]
    return answer or ": ".join([f"the process {describe_exit(child.returncode)}", *words])
