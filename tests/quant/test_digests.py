"""A file is hashed once, and again as soon as anything about it changed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import digests
from quant.digests import DIGESTS, DigestMemo
from quant.errors import BadSource


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 3_000_000)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were really read."""
    seen: list[Path] = []
    real = digests.hash_file

    def spy(path: Path, progress: Callable[[int], None] | None = None) -> str:
        seen.append(path)
        return real(path, progress)

    monkeypatch.setattr(digests, "hash_file", spy)
    return seen


def digest(cache: Path, file: Path, *, since_boot: bool = False) -> str:
    memo = DigestMemo(cache)
    found = memo.sha256(file, since_boot=since_boot)
    memo.save()
    return found


def test_an_unchanged_file_is_read_once(tmp_path: Path, file: Path, read: list[Path]) -> None:
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    assert not DigestMemo(cache).is_known(file)
    assert [digest(cache, file), digest(cache, file)] == [expected, expected]
    assert DigestMemo(cache).is_known(file)
    assert len(read) == 1
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == [DIGESTS]


def test_progress_counts_every_byte(tmp_path: Path, file: Path) -> None:
    counts: list[int] = []
    DigestMemo(tmp_path / "cache").sha256(file, progress=counts.append)
    assert sum(counts) == 3_000_000
    assert len(counts) > 1


def test_a_change_is_seen_even_with_the_old_size_and_time(tmp_path: Path, file: Path) -> None:
    before = file.stat()
    old = digest(tmp_path / "cache", file)
    file.write_bytes(b"b" * 3_000_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest(tmp_path / "cache", file) != old


def test_another_file_of_the_same_name_is_seen(tmp_path: Path, file: Path) -> None:
    old = digest(tmp_path / "cache", file)
    other = tmp_path / "other"
    other.write_bytes(b"c" * 3_000_000)
    other.rename(file)
    assert digest(tmp_path / "cache", file) != old


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path, file: Path) -> None:
    def grow(_: int) -> None:
        with file.open("ab") as stream:
            stream.write(b"x")

    with pytest.raises(BadSource, match="changed while"):
        DigestMemo(tmp_path / "cache").sha256(file, progress=grow)


def test_a_digest_from_before_the_boot_can_be_refused(
    tmp_path: Path, file: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_boot", lambda: "yesterday")
    digest(tmp_path, file, since_boot=True)
    monkeypatch.setattr(digests, "_boot", lambda: "today")
    digest(tmp_path, file)
    assert len(read) == 1
    digest(tmp_path, file, since_boot=True)
    digest(tmp_path, file, since_boot=True)
    assert len(read) == 2


def test_two_processes_keep_each_others_digests(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "second"
    other.write_bytes(b"2")
    one, two = DigestMemo(tmp_path / "cache"), DigestMemo(tmp_path / "cache")
    one.sha256(file)
    two.sha256(other)
    one.save()
    two.save()
    merged = DigestMemo(tmp_path / "cache")
    assert merged.is_known(file)
    assert merged.is_known(other)


def test_files_that_are_gone_are_forgotten(tmp_path: Path, file: Path) -> None:
    digest(tmp_path / "cache", file)
    file.unlink()
    other = tmp_path / "other"
    other.write_bytes(b"1")
    digest(tmp_path / "cache", other)
    assert str(file) not in (tmp_path / "cache" / DIGESTS).read_text()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff", b'{"a": {"size": "x"}}'])
def test_a_broken_memo_is_forgotten(tmp_path: Path, file: Path, content: bytes) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / DIGESTS).write_bytes(content)
    assert digest(cache, file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert DigestMemo(cache).is_known(file)


def test_a_memo_that_cannot_be_saved_is_no_error(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert digest(tmp_path / "cache", file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / (DIGESTS + ".new")).write_text("half")
    DigestMemo(tmp_path).sweep()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
