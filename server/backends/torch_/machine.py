"""The device that a variant goes to, the numbers it computes in, and how much memory is there."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from server.backends.torch_.linear.choose import Target
from server.backends.torch_.options import Options
from server.errors import OpenError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def choose_device(options: Options) -> torch.device:
    """Raises OpenError for a device that is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OpenError("this machine has no CUDA device that torch can use")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def choose_target(options: Options, device: torch.device, own: object, elements: int) -> Target:
    """For a model of so many weights, whose checkpoint says that it computes in `own`.

    A GPU keeps the checkpoint's dtype, and quantized weights as they are stored. A CPU computes in float32,
    which is exact, and unpacks weights once, which is several times faster than at each use; where that takes
    more than half of the free memory it computes in bf16, and where even that does, weights stay packed.
    """
    if device.type == "cuda":
        dtype = next((dtype for dtype in DTYPES.values() if dtype == own), torch.float16)
        return Target(device, DTYPES.get(options.dtype, dtype), options.weights == "dense")
    room = free_memory(device) // 2
    dtype = DTYPES.get(options.dtype, torch.float32 if 4 * elements <= room else torch.bfloat16)
    dense = options.weights == "dense" or dtype.itemsize * elements <= room
    return Target(device, dtype, dense and options.weights != "packed")


def free_memory(device: torch.device) -> int:
    """Bytes that may be used now: of the GPU, or of this machine or the container around us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = [_meminfo("MemAvailable")]
    with suppress(OSError, ValueError):  # not there, or "max"
        group = Path("/sys/fs/cgroup")
        amounts.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(amounts))


def _meminfo(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize


def set_threads(threads: int) -> None:
    """Before the first computation: later ones cannot change all of it."""
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
