"""A disk that fails: `python -m tests.faults.disk MODEL FOLDER ERROR` builds a variant again and again.

Each time one more file operation succeeds, until the build ends well. ERROR is ENOSPC, EIO or EROFS. Faults
come where a build opens a file for writing, renames, makes a folder or syncs.
"""

import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from tests.quant.killed import ending, fork

CHANGES = frozenset({"os.rename", "os.mkdir", "os.truncate"})


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


def attempt(model: str, cache: Path, code: int, left: int) -> None:
    """Ends with 0 where the build ended well, 3 where it failed by one clear error."""
    faults = Faults(cache, code)
    faults.install()
    faults.left = left
    try:
        build(model, cache)
    except (QuantError, OSError) as error:
        os._exit(3 if faults.met and "\n" not in str(error) else 4)
    os._exit(0)


def main(model: str, folder: Path, name: str) -> None:
    code, failures = getattr(errno, name), 0
    old = folder / "old"
    build(model, old)
    [kept] = VariantStore(old).list()
    for left in range(1000):
        cache = folder / str(left)
        status = ending(fork(partial(attempt, model, cache, code, left)))
        store = VariantStore(cache)
        assert status in (0, 3), status
        assert store.damaged() == ()
        for variant in store.list():
            store.verify(variant.key)
        if status == 0:
            break
        failures += 1
        assert sum(one.bytes for one in store.unfinished()) == 0
        assert ending(fork(partial(build, model, cache))) == 0  # there is room again
        [again] = VariantStore(cache).list()
        assert again.manifest == kept.manifest
    sys.stdout.write(f"{failures}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
