"""sha256 of files, remembered in `<cache>/digests.json` so that an unchanged file is hashed once."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache as once
from pathlib import Path

import msgspec
from msgspec import Struct

from quant.errors import BadSource
from quant.files import open_regular, replace_synced
from quant.locks import lock_file, try_lock_file

DIGESTS = "digests.json"
CHUNK = 1 << 20  # bytes


class Remembered(Struct, frozen=True, kw_only=True):
    size: int
    mtime_ns: int
    ctime_ns: int  # tools can set the other time back, not this one
    inode: int
    sha256: str
    boot: str  # boot of the machine during which the file was read


class DigestMemo:
    """One process's view of the memo: a short cut, whose loss costs only time."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / DIGESTS
        self._lock = cache / "locks" / "digests"
        self._known = self._load()
        self._fresh: dict[str, Remembered] = {}

    def sha256(
        self, path: Path, *, since_boot: bool = False, progress: Callable[[int], None] | None = None
    ) -> str:
        """Hex digest of the file's content; `progress` gets the bytes of each chunk.

        With `since_boot` a digest counts only if the file was read since the machine started. Raises
        BadSource for a file that cannot be read or that changes meanwhile.
        """
        real = path.resolve()
        before = _state(real)
        known = self._known.get(str(real))
        if known and _matches(known, before) and (known.boot == _boot() or not since_boot):
            return known.sha256
        digest = hash_file(real, progress)
        if _facts(_state(real)) != _facts(before):
            raise BadSource(f"{path.name} changed while it was read")
        self._fresh[str(real)] = self._known[str(real)] = _remember(before, digest)
        return digest

    def is_known(self, path: Path) -> bool:
        """Whether `sha256` would answer without reading the file."""
        real = path.resolve()
        known = self._known.get(str(real))
        return known is not None and _matches(known, _state(real))

    def save(self) -> None:
        """Add what was hashed since the last save to the file, keeping what other processes wrote."""
        if not self._fresh:
            return
        try:
            with lock_file(self._lock):
                merged = {path: known for path, known in self._load().items() if os.path.exists(path)}
                replace_synced(self._file, msgspec.json.encode({**merged, **self._fresh}))
        except OSError:  # a read-only or full disk: the next start hashes again
            self.sweep()
        else:
            self._fresh = {}

    def sweep(self) -> None:
        """Remove what a writer that was killed left behind."""
        fresh = self._file.with_name(DIGESTS + ".new")
        if fresh.exists():
            with suppress(OSError), try_lock_file(self._lock) as mine:
                if mine:
                    fresh.unlink(missing_ok=True)

    def _load(self) -> dict[str, Remembered]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, Remembered])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BadSource(f"{path.name} cannot be read: {error.strerror}") from error


def _facts(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _matches(known: Remembered, status: os.stat_result) -> bool:
    return (known.size, known.mtime_ns, known.ctime_ns, known.inode) == _facts(status)


def _remember(status: os.stat_result, digest: str) -> Remembered:
    size, mtime_ns, ctime_ns, inode = _facts(status)
    return Remembered(
        size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns, inode=inode, sha256=digest, boot=_boot()
    )


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of the content; `progress` gets the bytes of each chunk. Raises BadSource."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open_regular(path) as stream:
        left = os.fstat(stream.fileno()).st_size  # a file that somebody appends to has an end, too
        while left > 0 and (count := stream.readinto(buffer[:left])):
            left -= count
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


@once
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux: nothing counts as read since boot
        return os.urandom(16).hex()
