"""A wall clock that jumps: FAULTS_CLOCK names a file with the seconds to add. No other clock does."""

import os
import time

_now = time.time


def _jumped() -> float:
    try:
        with open(os.environ["FAULTS_CLOCK"]) as stream:
            return _now() + float(stream.read() or 0)
    except (OSError, ValueError):
        return _now()


if "FAULTS_CLOCK" in os.environ:
    time.time = _jumped
