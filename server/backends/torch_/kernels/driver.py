"""Machine code in torch's CUDA context, launched on torch's current stream by the driver's C calls.

From compute capability 9.0 on launches overlap: a kernel starts while the one before it on the stream still
runs, and waits for its results itself (CUDA's programmatic dependent launch; `take_turn` in cuda/ptx.cu).
"""

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import torch

from server.backends.torch_.kernels import compile as compiler

Argument = torch.Tensor | int | float | None
"""A tensor is passed as its address, None as a null pointer, numbers as 32 bits."""

DYNAMIC_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PLAIN_SHARED_BYTES = 48 * 1024  # more has to be asked for


OVERLAP_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
OVERLAPS_FROM = (9, 0)


class CudaError(RuntimeError):
    pass


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Module(Protocol):
    """Compiled kernels."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared: int = 0,
        *,
        overlap: bool = True,
    ) -> None:
        """Enqueue; nothing waits. `shared` bytes of dynamic shared memory.

        `overlap`: the kernel may be started while the one before it runs.
        """
        ...


def pack_arguments(arguments: Sequence[Argument]) -> tuple[list[Any], Any]:
    """The values, which must outlive the call, and an array of pointers to them."""
    values: list[Any] = []
    for argument in arguments:
        match argument:
            case torch.Tensor():
                values.append(ctypes.c_void_p(argument.data_ptr()))
            case float():
                values.append(ctypes.c_float(argument))
            case int():
                values.append(ctypes.c_int(argument))
            case None:
                values.append(ctypes.c_void_p())
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return values, pointers


class CudaModule:
    def __init__(self, code: bytes, device: torch.device) -> None:
        self._cuda = _library()
        self._device = device
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}
        self._overlap = Attribute(id=OVERLAP_ATTRIBUTE, value=1)
        self._can_overlap = torch.cuda.get_device_capability(device) >= OVERLAPS_FROM
        self._handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the context current
            torch.zeros((), device=device)
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(self._handle), code))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared: int = 0,
        *,
        overlap: bool = True,
    ) -> None:
        function = self._functions.get((kernel, shared)) or self._find(kernel, shared)
        values, pointers = pack_arguments(arguments)
        launch = Launch(
            grid=grid,
            block=(threads, 1, 1),
            shared=shared,
            stream=torch.cuda.current_stream(self._device).cuda_stream,
            attributes=ctypes.pointer(self._overlap),
            attribute_count=int(overlap and self._can_overlap),
        )
        self._check(self._cuda.cuLaunchKernelEx(ctypes.byref(launch), function, pointers, None))
        del values

    def _find(self, kernel: str, shared: int) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), self._handle, kernel.encode()))
        if shared > PLAIN_SHARED_BYTES:
            self._check(self._cuda.cuFuncSetAttribute(function, DYNAMIC_SHARED_ATTRIBUTE, shared))
        self._functions[kernel, shared] = function
        return function

    def _check(self, status: int) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"CUDA: {(text.value or b'unknown error').decode()} ({status})")


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def load(device: torch.device, files: tuple[str, ...], defines: tuple[tuple[str, int], ...]) -> Module:
    """Raises compile.CannotCompile. The first call compiles (seconds), unless the cache has it."""
    code = compiler.cubin(compiler.source(*files), dict(defines), architecture(device))
    return CudaModule(code, device)
