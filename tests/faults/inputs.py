"""Spoils files and asks two readers: ours, in this process, and the native one, in a child that may die.

`python -m tests.faults.inputs gguf|safetensors FILE FOLDER COUNT` writes figures as JSON.
"""

import json
import os
import random
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from quant.errors import BadSource

MEMORY = 1 << 30  # bytes that a native reader may take for a file of a few hundred kB
SECONDS = 5
HUGE = (0, 1, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


def spoilt(raw: bytes, head: int, rng: random.Random) -> bytes:
    """Something wrong, mostly within the first `head` bytes, where counts, sizes and offsets are."""
    data = bytearray(raw)
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(head)] = rng.randrange(256)
        case 1:
            at = rng.randrange(head - 8)
            data[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
        case 2:
            at = rng.randrange(head - 4)
            data[at : at + 4] = struct.pack("<I", rng.choice(HUGE) & 0xFFFFFFFF)
        case 3:
            del data[rng.randrange(1, len(data)) :]
        case 4:
            at = rng.randrange(head)
            del data[at : at + rng.randrange(1, 64)]
        case 5:
            at = rng.randrange(head)
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        case _:
            at, other = rng.randrange(head - 16), rng.randrange(head - 16)
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def spoilt_json(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is JSON, but of something else."""
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    match rng.randrange(6):
        case 0:
            entry["data_offsets"][rng.randrange(2)] += rng.choice((-64, -1, 1, 7, 1 << 40, 1 << 63))
        case 1:
            entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
        case 2:
            entry["shape"] = rng.choice(([1 << 62, 4], [0], [-1, 4], [2.5], [1 << 32, 1 << 32], [], "x"))
        case 3:
            entry["dtype"] = rng.choice(("F64", "U8", "X9", "BOOL", 7, None))
        case 4:
            del entry[rng.choice(list(entry))]
        case _:
            entry["data_offsets"].reverse()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def ours(kind: str) -> Callable[[Path], object]:
    from quant.gguf.header import read_header as of_gguf
    from quant.safetensors_header import read_header as of_safetensors

    return of_gguf if kind == "gguf" else of_safetensors


def native(kind: str) -> Callable[[Path], object]:
    """Raises where it refuses."""
    if kind == "gguf":
        return _llama()
    from safetensors import safe_open

    def read(path: Path) -> None:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                file.get_tensor(name)

    return read


def _llama() -> Callable[[Path], object]:
    from quant.gguf.native import library

    llama = library()

    def load(path: Path) -> None:
        params = llama.llama_model_default_params()
        handle = llama.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise ValueError("refused")

    return load


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """ "read", "refused", or "died": by a signal, out of time, or for want of memory."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            read(path)
        except MemoryError:
            os._exit(9)
        except Exception:  # noqa: BLE001  whatever it says, it lives
            os._exit(3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os._exit(9 if peak > MEMORY else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "read", 3: "refused"}.get(status, "died")


def complaint_of(check: Callable[[Path], object], path: Path) -> str:
    """Empty where there is none."""
    try:
        check(path)
    except BadSource as error:
        return str(error)
    return ""


def main(kind: str, source: Path, folder: Path, count: int) -> None:
    raw, rng = source.read_bytes(), random.Random(15)
    head = len(raw) if kind == "gguf" else 8 + struct.unpack("<Q", raw[:8])[0]
    check, read = ours(kind), native(kind)
    if kind == "gguf":
        from quant.gguf.header import read_header

        head = min(tensor.start for tensor in read_header(source).tensors)
    assert outcome(read, source) == "read"
    check(source)
    seen: Counter[tuple[bool, str]] = Counter()
    for number in range(count):
        path = folder / f"{number}{source.suffix}"
        by_fields = kind == "safetensors" and number % 2
        path.write_bytes(spoilt_json(raw, rng) if by_fields else spoilt(raw, head, rng))
        complaint = complaint_of(check, path)
        assert "\n" not in complaint
        assert str(folder) not in complaint
        seen[bool(complaint), outcome(read, path)] += 1
        path.unlink()
    figures = {
        "files": count,
        "refused": sum(n for (refused, _), n in seen.items() if refused),
        "natively refused": sum(n for (_, how), n in seen.items() if how == "refused"),
        "deadly": sum(n for (_, how), n in seen.items() if how == "died"),
        "deadly and refused": seen[True, "died"],
        "natively refused and refused": seen[True, "refused"],
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
