"""Kills builders, many times over: `python -m tests.quant.killed WHAT FOLDER [...]`.

A process of its own, which has imported everything and has no threads, so that it can fork victims in a
millisecond. It checks what they leave and ends with an error at the first thing that is wrong.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from quant.manifest import MANIFEST
from quant.pipeline import build_variant
from quant.progress import Progress, Report, ignore
from quant.recipe import TORCH_PRESETS, parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from tests.quant.variants import KEYS, files_in, files_of, publish

KEY, OTHER = KEYS[:2]
CHANGING = frozenset(
    {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "os.listdir", "fcntl.flock"}
)
BEFORE = {"build": (), "replace": (KEY,), "evict": (OTHER,), "delete": (KEY,), "check": (KEY,)}


def main(arguments: list[str]) -> None:
    what, folder = arguments[0], Path(arguments[1])
    moments = at_random(folder, *arguments[2:]) if what == "random" else at_every_operation(folder, what)
    sys.stdout.write(f"{moments}\n")


def fork(work: Callable[[], None]) -> int:
    """Start `work` in a child that ends after it with 0, or 1 for an error."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def ending(child: int) -> int:
    """0, the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_every_operation(folder: Path, act: str) -> int:
    """Kill before the first file operation of `act`, before the second, ... until it ends by itself."""
    for last in range(1, 1000):
        cache = folder / str(last)
        store = VariantStore(cache, max_bytes=1100)
        for key in BEFORE[act]:
            publish(store, key)
        if act == "replace":
            (cache / "variants" / KEY / "model.gguf").write_bytes(b"damaged")
        code = ending(fork(lambda store=store, last=last: _die_before(last, lambda: _act(store, act))))  # type: ignore[misc]
        assert code in {0, -signal.SIGKILL}
        for variant in store.list():
            store.verify(variant.key)
        assert act == "replace" or store.damaged() == ()
        store.sweep()
        publish(store, KEY)
        store.verify(KEY)
        assert [name for name in files_in(cache) if name != "digests.json"] == files_of(KEY)
        if code == 0:
            return last - 1
    raise AssertionError("it never ended")


def _act(store: VariantStore, act: str) -> None:
    match act:
        case "delete":
            store.delete(KEY)
        case "check":
            store.ensure_intact(KEY)
        case _:
            publish(store, KEY)


def _die_before(last: int, work: Callable[[], None]) -> None:
    """Audit events come before the operation; ours come from the store alone."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in CHANGING:
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


def at_random(folder: Path, model: str, recipe: str, kills: str) -> int:
    """Kill whole builds, half at a stage's progress, half at a moment of the clock; then build to the end.

    A clock's moment can come after the build's end: rounds go on until so many died.
    """
    _import_everything(recipe)
    expected, seconds, steps = _undisturbed(folder / "calm", model, recipe)
    rng, killed = random.Random(0), 0
    for number in itertools.count():
        if killed >= int(kills):
            break
        assert number < 4 * int(kills), f"{killed} kills in {number} rounds"
        cache = folder / str(number)
        for _ in range(rng.choice([1, 1, 2])):
            if number % 2:
                last = rng.randrange(1, steps + 1)
                child = fork(lambda cache=cache, last=last: _build(cache, model, recipe, _killer(last)))  # type: ignore[misc]
            else:
                child = fork(lambda cache=cache: _build(cache, model, recipe, ignore))  # type: ignore[misc]
                time.sleep(rng.uniform(0, 1.1 * seconds))
                os.kill(child, signal.SIGKILL)
            killed += ending(child) == -signal.SIGKILL
            _nothing_half(cache)
        assert ending(fork(lambda cache=cache: _build(cache, model, recipe, ignore))) == 0  # type: ignore[misc]
        _nothing_half(cache)
        assert _contents(cache) == expected, f"round {number}"
    return killed


def _import_everything(recipe: str) -> None:
    """Before the forks: the time of a build is to be work."""
    import tokenizers  # noqa: F401

    if recipe in TORCH_PRESETS or recipe.startswith("{"):
        import torch
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        import quant.methods.gptq
        import quant.stream.road

        torch.set_num_threads(1)  # no pool of threads, which forks would lose
        return

    import quant.gguf.convert
    import quant.gguf.kquant
    import quant.gguf.probe  # noqa: F401
    from quant.gguf.native import library

    library()


def _undisturbed(cache: Path, model: str, recipe: str) -> tuple[dict[str, bytes], float, int]:
    steps: list[Progress] = []
    started = time.monotonic()
    child = fork(lambda: _build(cache, model, recipe, ignore))
    assert ending(child) == 0
    seconds = time.monotonic() - started
    pipe_end, other = os.pipe()
    child = fork(lambda: _count(cache.with_name("count"), model, recipe, steps, other))
    assert ending(child) == 0
    return _contents(cache), seconds, int(os.read(pipe_end, 20))


def _count(cache: Path, model: str, recipe: str, steps: list[Progress], out: int) -> None:
    _build(cache, model, recipe, steps.append)
    os.write(out, str(len(steps)).encode())


def _build(cache: Path, model: str, recipe: str, report: Report) -> None:
    spec = json.loads(recipe) if recipe.startswith("{") else recipe
    source, store = open_source(model, cache=cache), VariantStore(cache)
    build_variant(source, parse_recipe(spec), store, progress=report, threads=1, device="cpu")


def _killer(last: int) -> Report:
    seen = 0

    def report(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


def _nothing_half(cache: Path) -> None:
    store = VariantStore(cache)
    assert store.damaged() == ()
    for variant in store.list():
        store.verify(variant.key)


def _contents(cache: Path) -> dict[str, bytes]:
    """Every file of the cache but clock values and digests; the manifest covers itself and all others."""
    (variant,) = VariantStore(cache).list()
    assert list((cache / "scratch").iterdir()) == []
    assert list((cache / "locks").iterdir()) == []
    names = files_in(cache)
    named = {f"variants/{variant.key}/{file.path}" for file in variant.manifest.files}
    own = {"digests.json", f"variants/{variant.key}/{MANIFEST}", f"variants/{variant.key}/build.json"}
    text = {name for name in names if name.startswith("calibration/")}
    assert len(text) <= 1
    assert set(names) == named | own | text
    return {
        name: (cache / name).read_bytes() for name in sorted(named | {f"variants/{variant.key}/{MANIFEST}"})
    }


if __name__ == "__main__":
    main(sys.argv[1:])
