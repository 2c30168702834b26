"""Variants on disk: addressed by content, published by one rename, shared between processes by flock.

<cache>/variants/<key>/   published; a folder without a manifest does not exist
<cache>/scratch/<key>/    a build that is running or was interrupted
<cache>/quarantine/<key>/ a damaged variant, kept for a week to be looked at; never found, never counted
<cache>/locks/            present only while held
<cache>/digests.json      sha256 of files that were read before
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from quant.digests import DigestMemo, hash_file
from quant.errors import BadSource, DamagedVariant, DiskFull, UnknownVariant, VariantInUse
from quant.files import disk_full_is_typed, folder_bytes, make_folder, sync_file, sync_folder, write_synced
from quant.locks import claim_folder, lock_file, share_folder, try_lock_file
from quant.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, read_manifest

log = logging.getLogger(__name__)
DAY_S = 86_400.0
_KEY = re.compile(r"[0-9a-f]{32}")
_TRASH = ".trash"  # ending of folders in scratch that are being removed


@dataclass(frozen=True, slots=True)
class Variant:
    key: str
    path: Path
    manifest: Manifest

    @property
    def last_used(self) -> float:
        """Seconds since the epoch."""
        return self.path.stat().st_mtime


class Unfinished(NamedTuple):
    """Of an interrupted build, or in quarantine."""

    key: str
    bytes: int
    mtime: float  # seconds since the epoch


class VariantStore:
    def __init__(self, cache: Path, *, max_bytes: int | None = None) -> None:
        self.cache = cache
        self.max_bytes = max_bytes
        self._variants = cache / "variants"
        self._scratch = cache / "scratch"
        self._quarantine = cache / "quarantine"
        self._locks = cache / "locks"

    def find(self, key: str) -> Variant | None:
        """The published variant, if its manifest can be read and every file has its size."""
        try:
            variant = self._read(key)
            _check_sizes(variant)
        except (UnknownVariant, DamagedVariant):
            return None
        return variant

    def list(self) -> list[Variant]:
        """Every variant that `find` finds, least recently used first."""
        found = [variant for key in self._keys() if (variant := self.find(key))]
        return sorted(found, key=lambda variant: variant.last_used)

    def damaged(self) -> tuple[str, ...]:
        """Keys of published folders that `find` does not accept."""
        return tuple(key for key in self._keys() if self.find(key) is None)

    def is_damaged(self, key: str) -> bool:
        """Whether something is published under the key that `find` does not accept."""
        return self._folder(key).is_dir() and self.find(key) is None

    def quarantined(self) -> tuple[Unfinished, ...]:
        """Damaged variants that were taken out of service, with the time of that."""
        found: list[Unfinished] = []
        for folder in _folders(self._quarantine):
            with suppress(FileNotFoundError):  # another process has just removed it
                found.append(Unfinished(folder.name, folder_bytes(folder), folder.stat().st_mtime))
        return tuple(found)

    def unfinished(self) -> tuple[Unfinished, ...]:
        """Builds that run or were interrupted."""
        return tuple(
            Unfinished(folder.name, folder_bytes(folder), _newest(folder))
            for folder in _folders(self._scratch)
            if _KEY.fullmatch(folder.name)
        )

    def verify(self, key: str) -> Variant:
        """Compare every file with its hash. Raises UnknownVariant, DamagedVariant."""
        variant = self._read(key)
        _check_sizes(variant)
        for file in variant.manifest.files:
            _check_digest(variant, file, hash_file)
        return variant

    def ensure_intact(self, key: str) -> Variant:
        """`verify`, but files that did not change since they were hashed, during this boot, are not read."""
        variant = self._read(key)
        _check_sizes(variant)
        memo = DigestMemo(self.cache)
        for file in variant.manifest.files:
            _check_digest(variant, file, partial(memo.sha256, since_boot=True))
        memo.save()
        return variant

    def delete(self, key: str) -> None:
        """Remove a variant, whole or damaged. Raises UnknownVariant, VariantInUse."""
        with self._claimed(key) as folder:
            trash = self._set_aside(folder)
        shutil.rmtree(trash, ignore_errors=True)

    def quarantine(self, key: str) -> None:
        """Take a damaged variant out of service, and keep its files in place of those that were kept before
        under the same key. Raises UnknownVariant, VariantInUse."""
        self.clear_quarantine(key)
        with self._claimed(key) as folder:
            make_folder(self._quarantine)
            os.utime(folder)  # the time is counted from now
            folder.rename(self._quarantine / key)
            sync_folder(folder.parent)
            sync_folder(self._quarantine)

    def clear_quarantine(self, key: str | None = None) -> bool:
        """Remove what is in quarantine, of this key or all. False: there was nothing."""
        kept = [one.key for one in self.quarantined() if key in (None, one.key)]
        for name in kept:
            with suppress(FileNotFoundError):  # another process was quicker
                shutil.rmtree(self._set_aside(self._quarantine / name), ignore_errors=True)
        return bool(kept)

    @contextmanager
    def _claimed(self, key: str) -> Iterator[Path]:
        """A variant's folder while nobody uses it. Raises UnknownVariant, VariantInUse."""
        folder = self._folder(key)
        try:
            with claim_folder(folder):
                yield folder
        except FileNotFoundError as error:
            raise UnknownVariant(f"there is no variant {key}") from error
        except BlockingIOError as error:
            raise VariantInUse(f"variant {key} is being served") from error

    @contextmanager
    def use(self, key: str) -> Iterator[Variant]:
        """Keep the variant from being deleted or evicted. Raises UnknownVariant, DamagedVariant."""
        folder = self._folder(key)
        try:
            with share_folder(folder):
                variant = self._read(key)
                with suppress(OSError):  # a cache may be read-only: then nothing is evicted either
                    os.utime(folder)
                yield variant
        except FileNotFoundError as error:
            if folder.exists():  # raised by the user of the variant
                raise
            raise UnknownVariant(f"there is no variant {key}") from error

    @contextmanager
    def building(self, key: str) -> Iterator["Build"]:
        """Be the only builder of `key`; waits for another one. What it finds in scratch may be resumed.

        Raises DiskFull for a full disk, also inside the block.
        """
        with disk_full_is_typed(), lock_file(self._locks / self._folder(key).name):
            yield Build(self, key)

    def discard_scratch(self, key: str) -> bool:
        """Remove what an interrupted build left. False: somebody is building it right now."""
        folder = self._scratch / self._folder(key).name
        with try_lock_file(self._locks / key) as mine:
            if mine:
                shutil.rmtree(folder, ignore_errors=True)
            return mine

    def make_room(self, needed: int) -> None:
        """Delete least recently used variants until `needed` bytes fit the limit. Raises DiskFull."""
        if self.max_bytes is None:
            return
        if needed > self.max_bytes:  # deleting would not help
            raise DiskFull(f"{needed:,} bytes do not fit the cache's limit of {self.max_bytes:,}")
        variants = self.list()
        excess = sum(variant.manifest.bytes for variant in variants) + needed - self.max_bytes
        if excess + sum(one.bytes for one in self.quarantined()) > 0:
            self.clear_quarantine()
        for variant in variants:
            if excess <= 0:
                return
            with suppress(VariantInUse, UnknownVariant):
                self.delete(variant.key)
                excess -= variant.manifest.bytes
        if excess > 0:
            raise DiskFull(f"variants in use leave {excess:,} bytes too few below the cache's limit")

    def free_bytes(self) -> int:
        """Room on the cache's disk for somebody who is not root."""
        folder = self.cache
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def sweep(self, max_age_s: float = 7 * DAY_S) -> None:
        """Remove old scratch, scratch of published variants, what was long in quarantine, and what killed
        processes left behind."""
        for folder in _folders(self._scratch):
            if not _KEY.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
            elif self.find(folder.name) or _newest(folder) < time.time() - max_age_s:
                self.discard_scratch(folder.name)
        for one in self.quarantined():
            if one.mtime < time.time() - max_age_s:
                self.clear_quarantine(one.key)
        DigestMemo(self.cache).sweep()
        self.sweep_locks()

    def sweep_locks(self) -> None:
        """Remove the files of locks that killed processes held; a read-only cache keeps them."""
        with suppress(OSError):
            for name in os.listdir(self._locks):
                with try_lock_file(self._locks / name):  # releasing a lock removes its file
                    pass

    def publish(self, key: str, staged: Path, manifest: Manifest) -> Variant:
        """Give the synced files in `staged` their name. Only `Build.publish` calls this."""
        folder = self._folder(key)
        make_folder(folder.parent)
        with lock_file(self._locks / "publish"):  # two builds must not count the same room
            if folder.exists():
                shutil.rmtree(self._set_aside(folder), ignore_errors=True)  # damaged, or `find` had found it
            self.make_room(manifest.bytes)
            staged.rename(folder)
        try:
            sync_folder(folder.parent)
            sync_folder(staged.parent)
        except OSError as error:  # the variant is whole and in use from here on
            log.warning("variant %s: its name may not survive a power cut: %s", key, error.strerror)
        return Variant(key, folder, manifest)

    def scratch(self, key: str) -> Path:
        return self._scratch / self._folder(key).name

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):  # a key may come from a command line
            raise UnknownVariant("a variant's key has 32 hexadecimal digits")
        return self._variants / key

    def _keys(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in _folders(self._variants) if _KEY.fullmatch(folder.name))

    def _read(self, key: str) -> Variant:
        folder = self._folder(key)
        if not folder.is_dir():
            raise UnknownVariant(f"there is no variant {key}")
        manifest = read_manifest(folder)
        if manifest.key != key:
            raise DamagedVariant(f"variant {key} has the manifest of {manifest.key[:32]}")
        return Variant(key, folder, manifest)

    def _set_aside(self, folder: Path) -> Path:
        """Take the name from a variant. Synced, so that no crash shows a half-removed one."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        trash = self._scratch / f"{folder.name}-{os.getpid()}-{time.monotonic_ns()}{_TRASH}"
        folder.rename(trash)
        sync_folder(folder.parent)
        sync_folder(trash.parent)
        return trash


@dataclass(frozen=True, slots=True)
class Build:
    """The right to build one key. Files for the variant go to `out`, anything else to `scratch`."""

    store: VariantStore
    key: str

    @property
    def scratch(self) -> Path:
        return self.store.scratch(self.key)

    @property
    def out(self) -> Path:
        return self.scratch / "out"

    def start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    def abandon(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def records(self, *, unlisted: frozenset[str] = frozenset()) -> tuple[FileRecord, ...]:
        """What lies in `out`, hashed, but for the names in `unlisted`."""
        paths = sorted(path for path in self.out.rglob("*") if path.is_file())
        return tuple(
            FileRecord(path=name, size=path.stat().st_size, sha256=hash_file(path))
            for path in paths
            if (name := path.relative_to(self.out).as_posix()) not in unlisted | {MANIFEST}
        )

    def publish(self, manifest: Manifest) -> Variant:
        """Sync every file, then the manifest, then rename; a crash before the rename publishes nothing."""
        with disk_full_is_typed():
            for path in self.out.rglob("*"):
                sync_file(path)
            write_synced(self.out / MANIFEST, encode_manifest(manifest))
            sync_folder(self.out)
            variant = self.store.publish(self.key, self.out, manifest)
        self.abandon()
        return variant


def _check_sizes(variant: Variant) -> None:
    for file in variant.manifest.files:
        try:
            size = (variant.path / file.path).stat().st_size
        except OSError as error:
            raise DamagedVariant(f"variant {variant.key} lacks {file.path}") from error
        if size != file.size:
            raise DamagedVariant(f"variant {variant.key}: {file.path} has {size:,} bytes, not {file.size:,}")


def _check_digest(variant: Variant, file: FileRecord, sha256: Callable[[Path], str]) -> None:
    try:
        digest = sha256(variant.path / file.path)
    except BadSource as error:
        raise DamagedVariant(f"variant {variant.key}: {error}") from error
    if digest != file.sha256:
        raise DamagedVariant(f"variant {variant.key}: {file.path} is not what was built")


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def _newest(folder: Path) -> float:
    """When anything in `folder` was last written."""
    newest = 0.0
    for root, _, names in os.walk(folder):
        for path in (root, *(os.path.join(root, name) for name in names)):
            with suppress(FileNotFoundError):
                newest = max(newest, os.lstat(path).st_mtime)
    return newest
