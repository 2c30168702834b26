"""The real command, run as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


UNMEASURED = {"QUANTSERVE_MEASURE_BUDGET": "0"}  # tests of other things do not wait for it


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Nothing of the tester's own settings, and the working tree on the module path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QUANTSERVE_")}
    return (
        clean | {"HOME": str(home), "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", **UNMEASURED} | variables
    )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "server", *map(str, arguments)]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `quantserve ARGUMENTS` in an empty folder, with variables as keyword arguments."""

    def run(*arguments: str | Path, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*arguments),
            env=environment(tmp_path, **variables),
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
