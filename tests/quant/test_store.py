"""Variants are whole or absent, and nobody takes one away from an engine."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from quant.errors import DamagedVariant, DiskFull, UnknownVariant, VariantInUse
from quant.manifest import MANIFEST
from quant.store import DAY_S, Variant, VariantStore
from tests.quant.variants import KEYS, files_in, files_of, fill, publish

KEY, OTHER, THIRD = KEYS[:3]


@pytest.fixture
def store(tmp_path: Path) -> VariantStore:
    return VariantStore(tmp_path / "cache")


def used_at(variant: Variant, seconds: float) -> None:
    os.utime(variant.path, (seconds, seconds))


def test_reading_an_empty_cache_writes_nothing(store: VariantStore) -> None:
    assert store.find(KEY) is None
    assert (store.list(), store.damaged(), store.unfinished()) == ([], (), ())
    store.sweep()
    with pytest.raises(UnknownVariant):
        store.verify(KEY)
    with pytest.raises(UnknownVariant):
        store.delete(KEY)
    with pytest.raises(UnknownVariant), store.use(KEY):
        pass
    assert not store.cache.exists()


def test_a_published_variant_is_found_and_nothing_else_is_left(store: VariantStore) -> None:
    variant = publish(store, KEY)
    assert store.find(KEY) == variant
    assert store.list() == [variant]
    assert store.verify(KEY) == variant
    assert files_in(store.cache) == files_of(KEY)
    assert list((store.cache / "scratch").iterdir()) == []
    assert list((store.cache / "locks").iterdir()) == []


def test_every_file_is_synced_before_the_name_is_given(
    store: VariantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, manifest, folder, the name of variants/, rename, variants/: power is cut at any time."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def spy_sync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{store.cache}/"))
        sync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        done.append(f"-> {target.relative_to(store.cache)}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    publish(store, KEY)
    out = f"scratch/{KEY}/out"
    assert sorted(done[:2]) == [f"{out}/model.gguf", f"{out}/tokenizer.json"]
    assert done[2:7] == [f"{out}/{MANIFEST}", out, str(store.cache), f"-> variants/{KEY}", "variants"]


@pytest.mark.parametrize(
    "key", ["", "..", "../..", "x" * 32, KEY.upper() + "0", f"../variants/{KEY}", KEY + "/"]
)
def test_a_key_is_no_path(store: VariantStore, key: str) -> None:
    publish(store, KEY)
    assert store.find(key) is None
    for act in (store.verify, store.delete, store.ensure_intact, store.discard_scratch, store.scratch):
        with pytest.raises(UnknownVariant):
            act(key)
    with pytest.raises(UnknownVariant), store.building(key):
        pass
    assert files_in(store.cache) == files_of(KEY)


def cut_model(folder: Path) -> None:
    with (folder / "model.gguf").open("rb+") as stream:
        stream.truncate(10)


def remove_model(folder: Path) -> None:
    (folder / "model.gguf").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def swap_manifest(folder: Path) -> None:
    raw = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(raw.replace(KEY, OTHER))


VISIBLE = [cut_model, remove_model, remove_manifest, break_manifest, swap_manifest]


@pytest.mark.parametrize("damage", VISIBLE)
def test_visible_damage_is_never_found_and_heals_by_building(
    store: VariantStore, damage: Callable[[Path], None]
) -> None:
    damage(publish(store, KEY).path)
    assert store.find(KEY) is None
    assert store.list() == []
    assert store.damaged() == (KEY,)
    for check in (store.verify, store.ensure_intact):
        with pytest.raises(DamagedVariant):
            check(KEY)
    publish(store, KEY)
    store.verify(KEY)
    assert files_in(store.cache) == files_of(KEY)


@pytest.mark.parametrize("damage", VISIBLE)
def test_a_damaged_variant_can_be_deleted(store: VariantStore, damage: Callable[[Path], None]) -> None:
    damage(publish(store, KEY).path)
    store.delete(KEY)
    assert files_in(store.cache) == []


@pytest.mark.parametrize("at", [0, 500, 999])
def test_one_flipped_bit_is_seen(store: VariantStore, at: int) -> None:
    path = publish(store, KEY).path / "model.gguf"
    store.ensure_intact(KEY)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    for check in (store.verify, store.ensure_intact):
        with pytest.raises(DamagedVariant, match=r"model\.gguf is not what was built"):
            check(KEY)


def test_checking_again_reads_no_weights_and_adds_one_file_once(store: VariantStore) -> None:
    publish(store, KEY)
    store.ensure_intact(KEY)
    assert files_in(store.cache) == ["digests.json", *files_of(KEY)]
    before = (store.cache / "digests.json").stat()
    store.ensure_intact(KEY)
    assert (store.cache / "digests.json").stat() == before


def test_a_variant_in_use_is_neither_deleted_nor_evicted(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, max_bytes=2100)
    publish(store, KEY)
    with store.use(KEY) as variant, store.use(KEY):
        with pytest.raises(VariantInUse):
            store.delete(KEY)
        with pytest.raises(DiskFull):
            store.make_room(2000)
        assert (variant.path / "model.gguf").exists()
        store.verify(KEY)
    store.delete(KEY)
    assert store.find(KEY) is None


def test_using_tells_the_time_and_adds_no_file(store: VariantStore) -> None:
    variant = publish(store, KEY)
    used_at(variant, 1000)
    before = files_in(store.cache)
    with store.use(KEY):
        assert time.time() - variant.last_used < 60
    assert files_in(store.cache) == before


def test_an_error_of_the_user_is_the_users(store: VariantStore) -> None:
    publish(store, KEY)
    with pytest.raises(FileNotFoundError, match="mine"), store.use(KEY):
        raise FileNotFoundError("mine")


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, max_bytes=3500)
    for n, key in enumerate((KEY, OTHER, THIRD)):
        used_at(publish(store, key), 1000 + n)
    used_at(store.verify(KEY), 2000)
    publish(store, KEYS[3])
    assert {variant.key for variant in store.list()} == {KEY, THIRD, KEYS[3]}
    with store.use(THIRD):
        publish(store, KEYS[4], size=2000)
        assert {variant.key for variant in store.list()} == {THIRD, KEYS[4]}


def test_a_variant_that_can_never_fit_evicts_nobody(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, max_bytes=3500)
    publish(store, KEY)
    with pytest.raises(DiskFull, match="limit"):
        publish(store, OTHER, size=9000)
    assert [variant.key for variant in store.list()] == [KEY]


def test_no_limit_evicts_nobody(store: VariantStore) -> None:
    for key in KEYS:
        publish(store, key)
    store.make_room(10**15)
    assert len(store.list()) == len(KEYS)


def test_an_interrupted_build_is_listed_kept_and_resumed(store: VariantStore) -> None:
    with suppress(KeyboardInterrupt), store.building(KEY) as build:
        fill(build)
        raise KeyboardInterrupt
    (unfinished,) = store.unfinished()
    assert (unfinished.key, unfinished.bytes) == (KEY, 1002)
    assert time.time() - unfinished.mtime < 60
    assert store.find(KEY) is None
    with store.building(KEY) as build:
        assert (build.out / "model.gguf").exists()
        build.publish(fill(build))
    assert store.unfinished() == ()


def test_scratch_is_discarded_only_when_nobody_builds(store: VariantStore) -> None:
    with store.building(KEY) as build:
        fill(build)
        assert not store.discard_scratch(KEY)
        assert build.out.exists()
    assert store.discard_scratch(KEY)
    assert store.unfinished() == ()
    assert store.discard_scratch(OTHER)


def test_the_second_builder_waits_for_the_first(store: VariantStore) -> None:
    seen: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with store.building(KEY):
            seen.append("second")

    thread = threading.Thread(target=second)
    with store.building(KEY):
        thread.start()
        entered.wait()
        time.sleep(0.05)
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]


def test_sweeping_removes_what_is_old_or_rubbish_and_nothing_else(store: VariantStore) -> None:
    publish(store, KEY)
    for key, age in ((OTHER, 8 * DAY_S), (THIRD, 6 * DAY_S)):
        with store.building(key) as build:
            fill(build)
        then = time.time() - age
        for path in (*build.scratch.rglob("*"), build.scratch):
            os.utime(path, (then, then))
    (store.cache / "scratch" / f"{KEY}-1-2.trash").mkdir()
    (store.cache / "scratch" / KEY / "out").mkdir(parents=True)  # killed between rename and clearing up
    (store.cache / "digests.json.new").write_text("half")
    (store.cache / "locks" / "stale").write_text("")
    with store.building(KEYS[5]) as build:
        fill(build)
        store.sweep(max_age_s=7 * DAY_S)
        assert build.out.exists()
    assert [one.key for one in store.unfinished()] == [THIRD, KEYS[5]]
    assert [name for name in files_in(store.cache) if not name.startswith("scratch/")] == files_of(KEY)
    assert list((store.cache / "locks").iterdir()) == []


def test_a_folder_where_a_file_should_be_is_not_swept_away_from_a_running_build(store: VariantStore) -> None:
    with store.building(KEY) as build:
        fill(build)
        store.sweep(max_age_s=-1)
        assert build.out.exists()
    store.sweep(max_age_s=-1)
    assert store.unfinished() == ()


def test_a_full_disk_is_typed(store: VariantStore) -> None:
    with pytest.raises(DiskFull), store.building(KEY), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_deleting_while_others_start_using(store: VariantStore) -> None:
    """Whoever got the variant keeps it whole; the others are told that it is gone."""
    for _ in range(30):
        publish(store, KEY)
        broken: list[str] = []

        def use(broken: list[str] = broken) -> None:
            with suppress(UnknownVariant), store.use(KEY) as variant:
                time.sleep(0.002)
                if not (variant.path / "model.gguf").exists():
                    broken.append("taken away")

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        with suppress(VariantInUse):
            store.delete(KEY)
        for thread in threads:
            thread.join()
        assert broken == []


def damaged(store: VariantStore, mark: str) -> None:
    (publish(store, KEY).path / "model.gguf").write_text(mark)
    store.quarantine(KEY)


def test_a_variant_in_quarantine_is_kept_and_not_found(store: VariantStore) -> None:
    for mark in ("one", "another"):
        damaged(store, mark)
        assert (store.list(), store.find(KEY), store.damaged(), store.unfinished()) == ([], None, (), ())
        with pytest.raises(UnknownVariant), store.use(KEY):
            pass
    (kept,) = store.quarantined()
    assert (kept.key, time.time() - kept.mtime < 60) == (KEY, True)
    assert (store.cache / "quarantine" / KEY / "model.gguf").read_text() == "another"  # the newest alone
    publish(store, KEY)
    assert [variant.key for variant in store.list()] == [KEY]
    assert store.clear_quarantine(OTHER) is False
    assert store.clear_quarantine(KEY) is True
    assert files_in(store.cache) == files_of(KEY)


def test_a_variant_in_use_is_not_put_into_quarantine(store: VariantStore) -> None:
    publish(store, KEY)
    with store.use(KEY), pytest.raises(VariantInUse):
        store.quarantine(KEY)
    assert store.quarantined() == ()
    with pytest.raises(UnknownVariant):
        store.quarantine(OTHER)


def test_a_sweep_empties_the_quarantine_after_a_week(store: VariantStore) -> None:
    damaged(store, "one")
    store.sweep()
    assert len(store.quarantined()) == 1
    old = time.time() - 7 * DAY_S - 60
    os.utime(store.cache / "quarantine" / KEY, (old, old))
    store.sweep()
    assert store.quarantined() == ()
    assert files_in(store.cache) == []


def test_room_for_a_variant_is_made_of_the_quarantine_first(store: VariantStore) -> None:
    size = publish(store, OTHER).manifest.bytes
    damaged(store, "x" * size)
    small = VariantStore(store.cache, max_bytes=4 * size)
    small.make_room(size)
    assert len(store.quarantined()) == 1
    small = VariantStore(store.cache, max_bytes=2 * size)
    small.make_room(size)
    assert store.quarantined() == ()
    assert [variant.key for variant in store.list()] == [OTHER]
