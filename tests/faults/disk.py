"""A disk that fails, at one point of a build after the other:
`python -m tests.faults.disk MODEL FOLDER ERROR POINTS EVERY`.

ERROR is ENOSPC, EDQUOT, EIO or EROFS. Each time EVERY more POINTS succeed, until none is left to fail:
`operations`, from then on, where a build opens a file for writing, renames, makes a folder or syncs; or one
of its `writes`, be it of Python or of native code, for which writing/writing.c is preloaded.

Printed are how many builds failed, and how many ended well all the same.
"""

import ctypes
import errno
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quant.errors import DiskFull, QuantError
from quant.files import NO_ROOM
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from tests.quant.killed import ending, fork

CHANGES = frozenset({"os.rename", "os.mkdir", "os.truncate"})
UNMET, FAILED, WRONG, WELL = 0, 3, 4, 5


class Faults:
    """The disk works `left` more times."""

    def __init__(self, cache: Path, code: int) -> None:
        self.cache, self.code = str(cache), code
        self.left = -1  # never
        self.met = False

    def touch(self, path: object) -> None:
        if self.left < 0 or not str(path).startswith(self.cache):
            return
        if self.left == 0:
            self.met = True
            raise OSError(self.code, os.strerror(self.code))
        self.left -= 1

    def install(self) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGES or (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                self.touch(arguments[0])

        sys.addaudithook(hook)
        setattr(os, "fsync", self._of_descriptor(os.fsync))  # noqa: B010  a patch on purpose

    def _of_descriptor(self, call: Callable[[Any], None]) -> Callable[[int], None]:
        def faulty(descriptor: int) -> None:
            self.touch(os.readlink(f"/proc/self/fd/{descriptor}"))
            call(descriptor)

        return faulty


def build(model: str, cache: Path) -> None:
    source = open_source(model, cache=cache)
    build_variant(source, parse_recipe("q8_0"), VariantStore(cache), progress=ignore, threads=1)


class Writes:
    """One write below `cache` fails after `left` others, whoever makes it."""

    def __init__(self, cache: Path, code: int) -> None:
        self.cache, self.code, self.left = cache, code, 0
        self._native = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def install(self) -> None:
        self._native.writing_arm(os.fsencode(self.cache), ctypes.c_long(self.left), self.code)

    @property
    def met(self) -> bool:
        return bool(self._native.writing_met())


def attempt(model: str, cache: Path, code: int, left: int, points: str) -> None:
    """Ends with UNMET, WELL or FAILED; else the error was not told as what it is."""
    faults = Writes(cache, code) if points == "writes" else Faults(cache, code)
    faults.left = left
    faults.install()
    try:
        build(model, cache)
    except (QuantError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(FAILED if faults.met and is_clear(error, code) else WRONG)
    os._exit(WELL if faults.met else UNMET)


def is_clear(error: Exception, code: int) -> bool:
    if "\n" in str(error):
        return False
    return isinstance(error, DiskFull) if code in NO_ROOM else os.strerror(code) in str(error)


def one(model: str, folder: Path, code: int, left: int, points: str) -> int:
    """How a build with a fault ended. What it left is whole, and the next build ends well."""
    cache = folder / str(left)
    status = ending(fork(partial(attempt, model, cache, code, left, points)))
    store = VariantStore(cache)
    assert status in (UNMET, WELL, FAILED), (left, status)
    assert store.damaged() == ()
    assert len(store.list()) == (status != FAILED)
    for variant in store.list():
        store.verify(variant.key)
    if status == FAILED:
        assert sum(one.bytes for one in store.unfinished()) == 0
    assert ending(fork(partial(build, model, cache))) == 0
    [again] = store.list()
    [kept] = VariantStore(folder / "old").list()
    assert again.manifest == kept.manifest
    return status


def main(model: str, folder: Path, name: str, points: str, every: str) -> None:
    build(model, folder / "old")
    endings = Counter[int]()
    for left in range(0, 1000, int(every)):
        status = one(model, folder, getattr(errno, name), left, points)
        endings[status] += 1
        if status == UNMET:
            break
    sys.stdout.write(f"{endings[FAILED]} {endings[WELL]}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
