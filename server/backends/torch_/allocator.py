"""The C library's allocator while weights are loaded: what was needed for a moment is given back."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
EAGER = 256 << 10  # bytes from which on memory is the system's again as soon as it is free
LAZY = 32 << 20  # where glibc itself arrives after a while, so that steps find memory that is there


@contextmanager
def giving_back() -> Iterator[None]:
    """Inside, large pieces are mapped one by one; glibc keeps tens of megabytes of them otherwise.

    Other C libraries have allocators that are left alone.
    """
    if not _set(MMAP_THRESHOLD, EAGER):
        yield
        return
    try:
        yield
    finally:
        _set(MMAP_THRESHOLD, LAZY)
        _set(TRIM_THRESHOLD, 2 * LAZY)
        ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except AttributeError:
        return False
