"""Kills servers while a name moves:
`python -m tests.server.pool.promoted FOLDER SOURCE every|written promote|rollback`.

A process of its own that forks victims, as tests.quant.killed does. After each kill a new server is asked who
answers to the bare name: it is the old or the new variant, and it answers.
"""

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

from quant.measure.measurement import files_digest, write_measurement
from quant.store import VariantStore
from server.catalog import Model
from server.pool.promoting import Promoter
from server.pool.promotions import Promoted, Promotions
from tests.conftest import build
from tests.quant.killed import fork
from tests.quant.measure.measurements import measurement
from tests.server.pool.support import answer, pool_of

OLD, NEW = "f16", "q8_0"
CHANGING = frozenset({"open", "os.rename", "os.remove", "os.utime", "os.mkdir", "fcntl.flock"})
ENGINES = frozenset({"os.fork", "subprocess.Popen"})


def main(arguments: list[str]) -> None:
    folder, source, moments, verb = Path(arguments[0]), *arguments[1:]
    seed = folder / "seed"
    for recipe in (OLD, NEW):
        measured(seed, Path(source), recipe)
    before, after = (OLD, NEW) if verb == "promote" else (NEW, OLD)
    if verb == "rollback":
        Promotions(seed).promote("m", NEW, OLD)
    killed, seen = 0, set()
    for last in range(1, 1000):
        cache = folder / str(last)
        shutil.copytree(seed, cache)
        code = ended(cache, source, last, moments, verb)
        assert code in {0, -signal.SIGKILL}, code
        name = who(cache, source)
        assert name in {OLD, NEW}, name
        seen.add(name)
        shutil.rmtree(cache)
        if code == 0:
            assert name == after
            break
        killed += 1
    assert seen == {before, after}
    sys.stdout.write(f"{killed}\n")


def measured(cache: Path, source: Path, recipe: str) -> None:
    """Built, and known to be good: what is promoted need not be measured first."""
    folder = build(cache, source, recipe)
    variant = VariantStore(cache).find(folder.name)
    assert variant is not None
    write_measurement(folder, measurement(0.001, files=files_digest(variant.manifest), variant=recipe))


def model_of(source: str) -> Model:
    return Model(id="m", source=source, variants=(OLD, NEW), default=OLD, backend="toy-rows", context=64)


def ended(cache: Path, source: str, last: int, moments: str, verb: str) -> int:
    """The exit status of a server that promotes; killed at moment number `last`, if it comes to it."""
    child = fork(lambda: asyncio.run(_move(cache, source, last, moments, verb)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def _move(cache: Path, source: str, last: int, moments: str, verb: str) -> None:
    model = model_of(source)
    pool = pool_of(cache, model)
    await pool.start()
    async with pool.acquire("m", wait_s=None) as lease:
        assert lease.variant.recipe == (OLD if verb == "promote" else NEW)
    killer = Killer(cache, last)
    if moments == "every":
        killer.arm()
    else:
        _arm_at_writing(pool.promotions, killer)
    promoter = Promoter(pool, pool._jobs)
    await (promoter.promote(model, NEW) if verb == "promote" else promoter.roll_back(model))
    killer.moment()
    await pool.close(grace_s=0)


def _arm_at_writing(promotions: Promotions, killer: "Killer") -> None:
    """Nothing written yet; every step of the writing; and written, but the engine before still there."""
    write = promotions._write

    def armed(every: dict[str, Promoted]) -> None:
        killer.arm()
        killer.moment()
        write(every)
        killer.moment()

    promotions._write = armed  # type: ignore[method-assign]


class Killer:
    """Audit events come before the operation; counted are those on files of the cache."""

    def __init__(self, cache: Path, last: int) -> None:
        self._cache, self._last, self._seen, self._armed = str(cache), last, 0, False
        sys.addaudithook(self._hook)

    def arm(self) -> None:
        self._armed = True

    def moment(self) -> None:
        self._seen += 1
        if self._seen == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._armed:
            return
        ours = event in CHANGING and (event == "fcntl.flock" or str(arguments[0]).startswith(self._cache))
        if ours or event in ENGINES:
            self.moment()


def who(cache: Path, source: str) -> str:
    """Who answers to the bare name in a server that is started anew."""
    out, into = os.pipe()
    child = fork(lambda: asyncio.run(_ask(cache, source, into)))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(into)
    name = os.read(out, 100).decode()
    os.close(out)
    assert code == 0, "nobody answers"
    return name


async def _ask(cache: Path, source: str, into: int) -> None:
    pool = pool_of(cache, model_of(source))
    await pool.start()
    async with pool.acquire("m", wait_s=None) as lease:
        assert len(await answer(lease)) == 8
        os.write(into, lease.variant.recipe.encode())
    await pool.close(grace_s=0)


if __name__ == "__main__":
    main(sys.argv[1:])
