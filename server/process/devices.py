"""How much processes hold, asked of the kernel and of the GPU's driver. No library of a GPU is loaded."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from server.process.child import child_environment

ASK_S = 10.0
MIB = 1 << 20


def held_bytes(pids: Iterable[int]) -> int:
    """Proportional set size: a page that several processes share is counted in parts that add up."""
    return sum(_pss(pid) for pid in pids)


def family(pid: int) -> list[int]:
    """The process and all that descend from it and run a program of their own.

    A child that is just being started (vfork) still has its parent's whole memory, and would count it again.
    """
    found = [pid]
    for parent in found:  # grows while it is read
        own = command_line(parent)
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [child for child in map(int, path.read_text().split()) if command_line(child) != own]
    return found


def command_line(pid: int) -> bytes:
    """Empty for a process that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def gpu_totals() -> dict[str, int]:
    """Bytes of each NVIDIA GPU, by torch's name of it; empty where there is none."""
    rows = _ask("--query-gpu=index,memory.total")
    return {f"cuda:{index}": int(total) * MIB for index, total in rows if total.isdigit()}


def gpu_bytes(pids: Iterable[int]) -> int:
    """Of GPU memory that these processes hold."""
    wanted = set(pids)
    rows = _ask("--query-compute-apps=pid,used_memory")
    return sum(int(used) * MIB for pid, used in rows if used.isdigit() and int(pid) in wanted)


def _ask(query: str) -> list[list[str]]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    clean = child_environment(os.environ)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True, env=clean)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
