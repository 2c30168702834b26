"""Reading foreign files carefully, and writing our own so that a crash leaves the old or the new one."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from quant.errors import BadSource, DiskFull

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})  # the disk's, or a quota's
_unshown: ContextVar[bool] = ContextVar("unshown", default=False)


@contextmanager
def unshown() -> Iterator[None]:
    """For callers who must not read in an error what they sent: it may be a secret in the wrong place."""
    token = _unshown.set(True)
    try:
        yield
    finally:
        _unshown.reset(token)


def quoted(value: object, lead: str = " ") -> str:
    """`lead` and what the caller sent, as one short printable line; within `unshown`, nothing."""
    return "" if _unshown.get() else lead + shown(value)


def shown(name: object) -> str:
    """A foreign value as one short printable line."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Raises BadSource for what is missing, unreadable, or a pipe, device or folder."""
    try:
        with open(path, "rb", opener=_without_waiting) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BadSource(f"{path.name} is not a regular file")
            yield stream
    except OSError as error:
        raise BadSource(f"{path.name} cannot be read: {error.strerror}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe must not hang


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises BadSource."""
    with open_regular(path) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise BadSource(f"{path.name} is larger than {limit:,} bytes")
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise BadSource(f"{path.name} is not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@contextmanager
def disk_full_is_typed() -> Iterator[None]:
    """Turn the system's ways to say "no room" into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull("the disk of the cache is full") from error
        raise


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder's entries are synced the same way


def make_folder(path: Path) -> None:
    """Make it and those above it where they are missing; the names of new ones survive a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file whose content survives a power cut; its name does after `sync_folder`."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_synced(path: Path, data: bytes) -> None:
    """Put `data` in place of `path` at once: a crash leaves the old content or the new, and maybe a *.new."""
    fresh = path.with_name(path.name + ".new")
    write_synced(fresh, data)
    fresh.rename(path)
    sync_folder(path.parent)


def folder_bytes(folder: Path) -> int:
    """Bytes of all regular files below `folder`; files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
