"""How many threads a computation may use, and how they wait for each other.

The affinity mask and the container's CPU quota count, not the machine: threads beyond either spin against
each other and make every step slower.
"""

import os
from collections.abc import Callable
from pathlib import Path

SMALL_PASS = 64 << 20  # bytes: a few milliseconds of one core
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SPINS = "1000"


def allowed_threads() -> int:
    """At least 1. A quota of 2.5 CPUs gives 2: a third thread would be throttled and the others wait."""
    cpus = len(os.sched_getaffinity(0))
    quota = cpu_quota(MEMBERSHIP, CGROUPS)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def useful_threads(allowed: int, pass_bytes: int) -> int:
    """For a pass that reads so much (LlamaModel.read_by).

    Threads wait for each other at every operation: where operations are short, one thread alone is the
    fastest, and the only one that a busy machine does not slow down.

    Milliseconds for one token with one thread and with two, the best and the median of 120, on 2 cores that
    others kept busy: stories260K 0.1 and 0.2, 13 and 24; tiny-chat in Q4_K_M 0.7 and 0.9, 8 and 37.
    """
    return 1 if pass_bytes < SMALL_PASS else allowed


def limit_spinning() -> None:
    """Before OpenMP's library is loaded, which reads this only then; what the user has set stays.

    Its threads wait for each other at every operation. By default they spin for milliseconds, so that one
    busy core makes steps ten times as long; threads that sleep at once wake up late. Milliseconds for one
    token of tiny-chat on 2 cores, quiet and with a busy program on one of them: by default 15 and 25 (best of
    three rounds, some far above), asleep at once 4.3 and 5.5, so 2.4 and 7.7 (llama.cpp, Q4_K_M). With torch
    (NF4) beside so much other work that fifteen processes wanted the 2 cores, a token took 174 ms of CPU time
    by default and 15 ms so.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def cpu_quota(membership: Path, mount: Path) -> float | None:
    """CPUs granted by the tightest of the process' control groups; None where nothing limits them."""
    quotas = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += _along(mount, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            quotas += _along(mount / "cpu", path, _quota_v1)
    return min(quotas, default=None)


def _along(root: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Quotas of the group and of all groups around it. In a container the root may be the group itself."""
    group = root / path.lstrip("/")
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return [quota for folder in groups if (quota := read(folder)) is not None]


def _quota_v2(folder: Path) -> float | None:
    match "".join(_lines(folder / "cpu.max")).split():
        case [quota, period] if quota != "max":
            return int(quota) / int(period)
    return None


def _quota_v1(folder: Path) -> float | None:
    quota = "".join(_lines(folder / "cpu.cfs_quota_us"))
    period = "".join(_lines(folder / "cpu.cfs_period_us"))
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
