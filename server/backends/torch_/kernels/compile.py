"""CUDA C++ to machine code at first use, kept under the cache folder by source, options and architecture.

NVRTC comes with CUDA builds of torch and needs neither headers nor a host compiler; without it, nvcc is
tried.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from server.settings import default_cache

SOURCES = Path(__file__).parent / "cuda"
Defines = Mapping[str, int]


class CannotCompile(Exception):
    """No compiler was found, or it refused; one line, then the compiler's own words if there are any."""


def source(*names: str) -> str:
    """The files of one module, one after the other: sources include nothing."""
    return "\n".join((SOURCES / f"{name}.cu").read_text() for name in names)


def cubin(text: str, defines: Defines, architecture: str) -> bytes:
    """Machine code for `architecture` ("sm_90"). Raises CannotCompile."""
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    key = hashlib.sha256("\0".join([text, architecture, *options]).encode()).hexdigest()[:32]
    kept = _folder() / f"{key}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    code = _compile(text, [f"-arch={architecture}", *options])
    _keep(kept, code)
    return code


def _folder() -> Path:
    return Path(os.environ.get("QUANTSERVE_CACHE") or default_cache()).expanduser() / "kernels"


def _keep(path: Path, code: bytes) -> None:
    """A cache that cannot be written costs time at the next start, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        return


def _compile(text: str, options: list[str]) -> bytes:
    if library := nvrtc():
        return _with_nvrtc(library, text, options)
    if compiler := nvcc():
        return _with_nvcc(compiler, text, options)
    raise CannotCompile("neither NVRTC (it comes with torch's CUDA builds) nor nvcc was found")


def available() -> bool:
    return nvrtc() is not None or nvcc() is not None


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvrtc() -> ctypes.CDLL | None:
    for name in _nvrtc_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _nvrtc_names() -> Iterator[str]:
    import torch

    if not (version := torch.version.cuda):
        return
    file = f"libnvrtc.so.{version.split('.')[0]}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    yield from map(str, sorted(packages.glob(f"*/lib/{file}*")))
    yield file


def _with_nvrtc(library: ctypes.CDLL, text: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    if created != 0:
        raise CannotCompile(f"NVRTC cannot create a program (error {created})")
    try:
        values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), values) != 0:
            raise CannotCompile("NVRTC refused a kernel:\n" + _read(library, program, "ProgramLog").decode())
        return _read(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _with_nvcc(compiler: str, text: str, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        input_path, output = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        input_path.write_text(text)
        command = [compiler, "-cubin", *options, "-o", str(output), str(input_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotCompile("nvcc refused a kernel:\n" + done.stderr)
        return output.read_bytes()
