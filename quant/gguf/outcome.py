"""Whether a file that llama.cpp wrote is whole, and else which error of the disk it met.

Its C++ streams give no reason, and the last bytes, which closing the file writes, may be lost without a word.
But `errno` is still what the failed write() left, for nothing sets it back. Where another call has changed
it, the disk is asked to take what is missing.
"""

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from quant.errors import BadSource
from quant.gguf.header import read_header

STREAM = "iostream error"  # libstdc++'s word for any failure of a file
OF_DISKS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE}
)


def _cell() -> "ctypes._Pointer[ctypes.c_int] | None":
    """The C library's errno of this thread; not ctypes' copy, which calls without `use_errno` leave alone."""
    locate = getattr(ctypes.CDLL(None), "__errno_location", None)
    if locate is None:  # another C library
        return None
    locate.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes._Pointer[ctypes.c_int] = locate()
    return found


class Errno:
    """From its making on, what the calls of this thread set."""

    def __init__(self) -> None:
        self._cell = _cell()
        if self._cell:
            self._cell[0] = 0

    def of_disk(self) -> int:
        """0: no error of a disk."""
        found = self._cell[0] if self._cell else 0
        return found if found in OF_DISKS else 0


def is_whole(target: Path) -> bool:
    """Header and sizes fit; a write that was lost leaves zeros in place of the header, or a shorter file."""
    try:
        read_header(target)
    except BadSource:
        return False
    return True


def asked(folder: Path, missing: int) -> int:
    """The errno of a disk that does not take `missing` bytes, else 0."""
    probe = folder / "room.probe"
    try:
        with probe.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(missing, 1))
            stream.write(b"\0")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return 0
