"""The kernels' own CUDA source, compiled for the CPU (emulator.h) and launched as on a GPU."""

import ctypes
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.backends.torch_.kernels import compile as compiler
from server.backends.torch_.kernels import driver

HERE = Path(__file__).parent
CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_uint] * 5, ctypes.c_void_p)


class EmulatedModule:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[driver.Argument],
        shared: int = 0,
        *,
        overlap: bool = True,
    ) -> None:
        values, pointers = driver.pack_arguments(arguments)
        CALL((f"emulate_{kernel}", self._library))(*grid, threads, shared, ctypes.addressof(pointers))
        del values


def kernel_names(text: str) -> list[str]:
    """Every kernel of a source: written out, or made by one of its macros."""
    plain = re.findall(
        r"^extern \"C\" __global__ void __launch_bounds__\(THREADS\) (\w+)\(", text, re.MULTILINE
    )
    made = re.findall(r"^(LINEAR|PAGED|DIRECT)\(([\d, ]+)\)", text, re.MULTILINE)
    return plain + ["_".join([macro.lower(), *numbers.split(", ")]) for macro, numbers in made]


def build(folder: Path, names: Sequence[str], defines: Mapping[str, int]) -> EmulatedModule:
    """`names`: the files of a module after ptx.cu, which the emulator replaces."""
    text = compiler.source(*names)
    exports = "".join(f"EXPORT({name})\n" for name in kernel_names(text))
    stem = "-".join([*names, *(f"{key}{value}" for key, value in sorted(defines.items()))])
    source, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
    if not library.exists():
        source.write_text(f'#include "{HERE / "emulator.h"}"\n{text}\n{exports}')
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            *flags,
            "-o",
            str(library),
            str(source),
        ]
        subprocess.run(command, check=True)
    return EmulatedModule(ctypes.CDLL(str(library)))
