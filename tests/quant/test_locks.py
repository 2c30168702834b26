"""Locks exclude, are freed by death, and leave no file."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quant.locks import claim_folder, lock_file, share_folder, try_lock_file

HOLD = """
import sys, time
from pathlib import Path
from quant.locks import lock_file
with lock_file(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(50):
            with lock_file(tmp_path / "locks" / "k"):
                inside += 1
                most = max(most, inside)
                turns += 1
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 300)
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with try_lock_file(path) as mine:
            assert not mine
        assert path.exists()
        holder.send_signal(signal.SIGKILL)
        with lock_file(path):
            pass
    assert not path.exists()


def test_trying_does_not_wait_and_then_holds(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with try_lock_file(path) as mine, try_lock_file(path) as second:
        assert (mine, second) == (True, False)
    with try_lock_file(path) as mine:
        assert mine


def test_an_error_inside_releases(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_file(tmp_path / "k"):
        raise RuntimeError
    assert not (tmp_path / "k").exists()


def test_a_shared_folder_is_not_claimed(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    with share_folder(folder), share_folder(folder), pytest.raises(BlockingIOError), claim_folder(folder):
        pass
    with claim_folder(folder):
        pass
    assert list(folder.iterdir()) == []


def test_who_waited_for_a_folder_that_went_away_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    seen: list[str] = []

    def share() -> None:
        try:
            with share_folder(folder):
                seen.append("shared")
        except FileNotFoundError:
            seen.append("gone")

    with claim_folder(folder):
        thread = threading.Thread(target=share)
        thread.start()
        time.sleep(0.05)
        folder.rename(tmp_path / "trash")
        folder.mkdir()  # another one of the same name
    thread.join()
    assert seen == ["gone"]


def test_descriptors_are_closed(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with lock_file(tmp_path / "k"), share_folder(folder), try_lock_file(tmp_path / "k"):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
