"""How much memory this machine, or the container around us, has, and what a build may take of it."""

import contextlib
import os
from pathlib import Path

BUILD_SHARE = 0.8
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            amounts.append(int(Path(path).read_text()))
    return min(amounts)


def build_memory() -> int:
    """Bytes that one build may hold."""
    return int(BUILD_SHARE * machine_memory())
