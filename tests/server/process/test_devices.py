"""Who counts as an engine's family, and what it holds."""

import os
import subprocess
import sys

from server.process.devices import family, held_bytes

PARENT = """
import os, subprocess, sys, time
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
forked = os.fork()
if forked:
    print(started.pid, forked, flush=True)
time.sleep(60)
"""


def test_a_child_that_still_has_its_parents_memory_is_not_counted_again() -> None:
    """As between vfork and exec, where it has all of it."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    started, forked = map(int, parent.stdout.readline().split())
    try:
        found = family(parent.pid)
        assert parent.pid in found
        assert started in found
        assert forked not in found
        assert held_bytes(found) > held_bytes([started]) > 0
    finally:
        for pid in (forked, started, parent.pid):
            os.kill(pid, 9)
        parent.wait()
        parent.stdout.close()
    assert family(parent.pid) == [parent.pid]
    assert held_bytes([parent.pid]) == 0
