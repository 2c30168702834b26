"""Toys whose steps take FAULTS_STEP_S seconds, as those of a GPU do: time in which the CPU is free."""

import os
import sys
import time
from typing import Any


class Stepping:
    """Wraps the toy's executor when a worker imports the loop that drives it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "server.engine.loop":
            from server.backends.toy import ToyExecutor

            collect = ToyExecutor.collect

            def late(self: ToyExecutor, ticket: object) -> Any:
                time.sleep(float(os.environ["FAULTS_STEP_S"]))
                return collect(self, ticket)

            setattr(ToyExecutor, "collect", late)  # noqa: B010  a patch on purpose


if "FAULTS_STEP_S" in os.environ:
    sys.meta_path.insert(0, Stepping())
