"""What a build runs on: device, threads, memory; and what must be equal for an interrupted one to go on."""

import ctypes
import os
import resource
from pathlib import Path

import msgspec
import torch

from quant.errors import BadRecipe
from quant.files import write_synced

IDENTITY = "identity.json"
M_MMAP_THRESHOLD, MMAP_FROM = -3, 1 << 20  # bytes
HOST_SHARE, DEVICE_SHARE = 0.3, 0.15  # of the free memory that activations may take


def choose_device(wanted: str) -> torch.device:
    """ "auto": CUDA where there is one. Raises BadRecipe for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in {"cpu", "cuda"}:
        raise BadRecipe(f"device is auto, cpu or cuda, not {wanted!r:.40}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadRecipe("there is no CUDA device here")
    return torch.device(wanted)


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """CPUs compute in float32, which holds every source exactly and is no slower there."""
    return torch.float32 if device.type == "cpu" else stored


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: on a GPU of its memory, else of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_memory() -> None:
    """What was freed goes back to the system, now and, if it is large, later (mallopt(3), malloc_trim(3))."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        libc.malloc_trim(0)


def home_of(size: int, device: torch.device) -> torch.device | None:
    """Where activations of `size` bytes are kept: on the GPU, in memory, or (None) on disk."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if size < DEVICE_SHARE * free:
        return device
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.device("cpu") if size < HOST_SHARE * available else None


def difference(scratch: Path, identity: dict[str, str]) -> str | None:
    """Why what lies in scratch cannot be gone on with; None where it can, or where nothing lies there."""
    try:
        old = msgspec.json.decode((scratch / IDENTITY).read_bytes(), type=dict[str, str])
    except FileNotFoundError:  # killed before anything was made
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return "it does not say what it was made with"
    for name in sorted(old.keys() | identity.keys()):
        if old.get(name) != identity.get(name):
            return f"{name} was {old.get(name)}, and is {identity.get(name)}"
    return None


def write_identity(scratch: Path, identity: dict[str, str]) -> None:
    write_synced(scratch / IDENTITY, msgspec.json.encode(identity, order="sorted"))
