"""Several builders of one variant: `python -m tests.faults.builders MODEL FOLDER ROUNDS`.

Two or eight processes ask for it at once. In every second round the one that holds the lock is killed at a
random moment. One of the others must then build it, once, to the same bytes, and nothing else may be left.
"""

import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from quant.manifest import MANIFEST, Manifest
from quant.pipeline import build_variant
from quant.progress import Progress
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from tests.quant.killed import ending, fork
from tests.quant.variants import files_in

CACHED, BUILT, KILLED = 7, 8, -signal.SIGKILL
CROWDS = (2, 8)


def build(model: str, cache: Path, pipe: int, start: float) -> None:
    """Says into the pipe who holds the lock, and ends with BUILT or CACHED."""
    time.sleep(max(0.0, start - time.monotonic()))
    told = False

    def report(_: Progress) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(pipe, f"{os.getpid()}\n".encode())

    source, recipe = open_source(model, cache=cache), parse_recipe("q8_0")
    done = build_variant(source, recipe, VariantStore(cache), progress=report, threads=1)
    os._exit(BUILT if done.outcome == "built" else CACHED)


def killed_holder(pipe: int, patience_s: float, delay_s: float) -> int:
    """Kills the first that says it holds the lock, after a while; 0: nobody said so."""
    if not select.select([pipe], [], [], patience_s)[0]:
        return 0
    holder = int(os.read(pipe, 20).split()[0])
    time.sleep(delay_s)
    os.kill(holder, signal.SIGKILL)
    return holder


def one_round(model: str, cache: Path, crowd: int, delay_s: float | None) -> tuple[Counter[int], float]:
    """How the builders ended, and the seconds until the last of them had."""
    ours, theirs = os.pipe()
    started = time.monotonic()
    children = [fork(partial(build, model, cache, theirs, started + 0.05)) for _ in range(crowd)]
    if delay_s is not None:
        killed_holder(ours, 30, delay_s)
    ends = Counter(ending(child) for child in children)
    os.close(ours)
    os.close(theirs)
    return ends, time.monotonic() - started


def check(cache: Path, ends: Counter[int], crowd: int, expected: Manifest) -> None:
    """A kill may come when the variant is published already: then nobody builds it again."""
    assert set(ends) <= {BUILT, CACHED, KILLED}, ends
    assert ends[BUILT] + ends[KILLED] in (1, 2), ends
    assert ends[BUILT] <= 1, ends
    assert ends.total() == crowd
    store = VariantStore(cache)
    [variant] = store.list()
    assert variant.manifest == expected
    store.verify(variant.key)
    assert list((cache / "scratch").iterdir()) == []
    assert list((cache / "locks").iterdir()) == []
    names = {f"variants/{variant.key}/{file.path}" for file in expected.files}
    others = {f"variants/{variant.key}/{name}" for name in (MANIFEST, "build.json")}
    assert set(files_in(cache)) == names | others | {"digests.json"}


def main(model: str, folder: Path, rounds: int) -> None:
    rng = random.Random(13)
    calm = folder / "calm"
    ends, seconds = one_round(model, calm, 1, None)
    [variant] = VariantStore(calm).list()
    slowest, killed = 0.0, 0
    for number in range(rounds):
        cache, crowd = folder / str(number), CROWDS[number // 2 % 2]
        delay_s = rng.uniform(0, seconds / 4) if number % 2 else None
        ends, took = one_round(model, cache, crowd, delay_s)
        check(cache, ends, crowd, variant.manifest)
        slowest, killed = max(slowest, took), killed + ends[KILLED]
        shutil.rmtree(cache)
    sys.stdout.write(f"{killed} {slowest:.2f}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
