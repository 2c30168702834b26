"""Locks between processes by flock: a killed holder lets go, and a released lock leaves no file behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold `path` exclusively, waiting for as long as it takes."""
    descriptor = _take(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextmanager
def try_lock_file(path: Path) -> Iterator[bool]:
    """True inside where nobody else held `path`; then it is held. Never waits."""
    try:
        descriptor = _take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        _release(path, descriptor)


def _take(path: Path, operation: int) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder went away in between
            continue
        _lock(descriptor, operation)
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # the holder before us removed the file: this lock guards nothing any more


def _release(path: Path, descriptor: int) -> None:
    """Remove the file while it is held: who waits for it notices and starts over."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _lock(descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


@contextmanager
def share_folder(folder: Path) -> Iterator[None]:
    """Keep `folder` from being claimed. Raises FileNotFoundError where it is gone or goes meanwhile."""
    with _folder(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` alone. Raises BlockingIOError while it is shared, FileNotFoundError where it is gone."""
    with _folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def _folder(folder: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _lock(descriptor, operation)
    try:
        if not _is_still(folder, descriptor):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(descriptor)
