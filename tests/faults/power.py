"""A power cut at any moment of a build: `python -m tests.faults.power MODEL RECIPE FOLDER EVERY [nosync]`.

The build is recorded: before each file operation, what every folder and file below the cache holds, and what
of it was synced. From each such moment disks are made as a power cut may leave them. Of a file they hold what
was synced last, or all, or zeros or noise where something was not synced; of a folder the names that it had
when it was synced, or those that it has. On each of them a variant must be whole or absent, and each EVERY-th
builds the variant again, to the same bytes. After the build's end it must be there.

Printed are the moments, the disks, those that were wrong and those that had lost the finished variant. With
`nosync` nothing counts as synced: a control that must fail.
"""

import os
import random
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from quant.errors import DamagedVariant
from quant.manifest import Manifest
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore

CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"})
WRITES = os.O_WRONLY | os.O_RDWR
Node = int  # a file or folder, for as long as it has a name
Names = dict[str, Node]


@dataclass
class Disk:
    """What is, or what was synced."""

    folders: dict[Node, Names] = field(default_factory=dict)
    files: dict[Node, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    now: Disk
    synced: Disk


class Recorder:
    def __init__(self, cache: Path, *, nosync: bool) -> None:
        self.cache, self.nosync = cache, nosync
        self.moments: list[Moment] = []
        self.synced = Disk()
        self._nodes: dict[int, Node] = {}  # by inode, which is used again after a file is gone
        self._count = 0
        self._on = self._looking = False

    def install(self) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
            if self._on and not self._looking and (event in CHANGES or writes):
                self._note()

        sys.addaudithook(hook)
        sync = os.fsync

        def recorded(descriptor: int) -> None:
            sync(descriptor)
            if self._on:
                self._note()
                self._sync(os.fstat(descriptor).st_ino)

        setattr(os, "fsync", recorded)  # noqa: B010  a patch on purpose

    def record(self, work: Callable[[], object]) -> list[Moment]:
        self._on = True
        work()
        self._note()
        self._on = False
        return self.moments

    def _note(self) -> None:
        self._looking = True
        now = Disk()
        seen: dict[int, Node] = {}
        self._look(self.cache, now, seen)
        self._nodes = seen
        self._looking = False
        self.moments.append(Moment(now, Disk(dict(self.synced.folders), dict(self.synced.files))))

    def _look(self, path: Path, now: Disk, seen: dict[int, Node]) -> Node:
        status = path.lstat()
        node = self._nodes.get(status.st_ino, -1)
        if node < 0:
            node = self._count
            self._count += 1
        seen[status.st_ino] = node
        if stat.S_ISDIR(status.st_mode):
            now.folders[node] = {child.name: self._look(child, now, seen) for child in sorted(path.iterdir())}
        else:
            now.files[node] = path.read_bytes()
        return node

    def _sync(self, inode: int) -> None:
        node = self._nodes.get(inode)
        if node is None or self.nosync:
            return
        now = self.moments[-1].now
        if node in now.folders:
            self.synced.folders[node] = now.folders[node]
        else:
            self.synced.files[node] = now.files[node]


def names_synced(moment: Moment, node: Node) -> Names:
    return moment.synced.folders.get(node, {})


def names_now(moment: Moment, node: Node) -> Names:
    return moment.now.folders.get(node, names_synced(moment, node))


def names_either(moment: Moment, node: Node) -> Names:
    """Some folders reached the disk, others did not."""
    return (names_synced, names_now)[random.Random(node * 7919).randrange(2)](moment, node)


def kept(moment: Moment, node: Node) -> bytes:
    return moment.synced.files.get(node, b"")


def written(moment: Moment, node: Node) -> bytes:
    return moment.now.files.get(node, kept(moment, node))


def zeroed(moment: Moment, node: Node) -> bytes:
    """The length reached the disk, the data did not."""
    data = written(moment, node)
    return data if data == kept(moment, node) else bytes(len(data))


def garbled(moment: Moment, node: Node) -> bytes:
    data = written(moment, node)
    half = len(data) // 2
    return (
        data if data == kept(moment, node) else data[:half] + random.Random(half).randbytes(len(data) - half)
    )


FOLDERS = (names_synced, names_now, names_either)
FILES = (kept, written, zeroed, garbled)


def write_disk(moment: Moment, node: Node, path: Path, names: Any, content: Any) -> None:
    path.mkdir()
    for name, child in names(moment, node).items():
        if child in moment.now.folders or child in moment.synced.folders:
            write_disk(moment, child, path / name, names, content)
        else:
            (path / name).write_bytes(content(moment, child))


def disks(moments: list[Moment], place: Path) -> Iterator[Path]:
    """Folder 0 is the cache; it was there before."""
    for moment in moments:
        for names, content in product(FOLDERS, FILES):
            write_disk(moment, 0, place, names, content)
            yield place
            shutil.rmtree(place)


def build(model: str, recipe: str, cache: Path) -> Manifest:
    source = open_source(model, cache=cache)
    store = VariantStore(cache)
    done = build_variant(source, parse_recipe(recipe), store, progress=ignore, threads=1, device="cpu")
    return done.variant.manifest


def is_sound(cache: Path) -> bool:
    """Every variant is whole, before and after what a start tidies up."""
    store = VariantStore(cache)
    try:
        for _ in range(2):
            for variant in store.list():
                store.verify(variant.key)
            if store.damaged():
                return False
            store.sweep()
    except DamagedVariant:
        return False
    return True


def main(model: str, recipe: str, folder: Path, every: int, nosync: bool) -> None:
    cache = folder / "recorded"
    cache.mkdir(parents=True)
    recorder = Recorder(cache, nosync=nosync)
    recorder.install()
    moments = recorder.record(lambda: build(model, recipe, cache))
    expected = VariantStore(cache).list()[0].manifest
    count = bad = 0
    for count, disk in enumerate(disks(moments, folder / "disk"), 1):
        whole = is_sound(disk)
        if whole and count % every == 0:
            whole = build(model, recipe, disk).files == expected.files and is_sound(disk)
        bad += not whole
    lost = sum(not VariantStore(disk).list() for disk in disks(moments[-1:], folder / "disk"))
    sys.stdout.write(f"{len(moments)} {count} {bad} {lost}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:] == ["nosync"])
