"""Blocking work in threads: results, errors, and an end of the process that waits for none of them."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from server.pool.background import in_thread


async def test_results_and_errors_come_back() -> None:
    loop_thread = threading.get_ident()
    assert await in_thread(threading.get_ident) != loop_thread
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_cancelling_does_not_wait_for_the_thread() -> None:
    release = threading.Event()
    task = asyncio.create_task(in_thread(release.wait))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()


def test_the_end_of_the_process_waits_for_no_thread() -> None:
    program = """
import asyncio, time
from server.pool.background import in_thread

async def main() -> None:
    task = asyncio.create_task(in_thread(lambda: time.sleep(60)))
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    assert time.monotonic() - started < 20
