"""The machine that figures were measured on, in words."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def cpu_model(cpuinfo: str) -> str:
    """The first "model name" of /proc/cpuinfo."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores() -> float:
    """Cores that this process may use: the affinity mask, cut by the control group's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe() -> list[str]:
    return [
        f"CPU: {cpu_model(Path('/proc/cpuinfo').read_text())}, {usable_cores():g} cores usable",
        f"memory: {memory_gib():.0f} GiB",
        f"load average before the run: {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}, llama-cpp-python {version('llama-cpp-python')}",
    ]
