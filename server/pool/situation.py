"""What this machine has free just now, for choosing among variants."""

from contextlib import suppress
from pathlib import Path

from server.pool.choosing import Situation

CUDA = Path("/dev/nvidiactl")
MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def situation(budget: int) -> Situation:
    """`budget`: bytes that all engines together may hold; idle ones make way."""
    return Situation(
        free_memory=min(budget, free_memory()),
        devices=frozenset({"cpu", "cuda"} if CUDA.exists() else {"cpu"}),
    )


def free_memory() -> int:
    """Bytes, of the machine or the container around us."""
    amounts = [
        1024 * int(line.split()[1])
        for line in MEMINFO.read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    with suppress(OSError, ValueError):  # no group, or one without a limit
        limit = int((GROUP / "memory.max").read_text())
        amounts.append(limit - int((GROUP / "memory.current").read_text()))
    return max(0, min(amounts, default=0))
