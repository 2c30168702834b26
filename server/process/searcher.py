"""`python -m server.process.searcher`: the recipe that meets a target is searched in a process of its own.

It builds and measures in children, ends with its parent, and keeps what it has found out: after a kill the
next search of the same target goes on where it was.
"""

import argparse
import asyncio
import os
import resource
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from quant.errors import BuildFailed
from quant.search.found import Found
from quant.source import open_source
from quant.store import VariantStore
from server.backends.llama.threads import limit_spinning
from server.process.builder import Reporter, guarded, take_stdout
from server.process.child import die_with
from server.process.orders import SearchOrder
from server.process.reports import BuildAnswer, Problem
from server.process.searching import Searching

NICE = 10  # requests that are being answered come first


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    answers = take_stdout()
    die_with(options.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)
    limit_spinning()
    reporter = Reporter(options.progress)
    done = guarded(lambda: asyncio.run(search(options.order, reporter)), BuildFailed.code, "the search")
    reporter.end(done if isinstance(done, Problem) else None)
    os.write(answers, msgspec.json.encode(_answer(done)) + b"\n")
    return 1 if isinstance(done, Problem) else 0


def _answer(done: Found | Problem) -> BuildAnswer:
    if isinstance(done, Problem):
        return BuildAnswer(error=done)
    return BuildAnswer(outcome="searched", key=done.winner.key if done.winner else None, found=done)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.process.searcher", description=__doc__)
    parser.add_argument("--order", type=partial(msgspec.json.decode, type=SearchOrder), required=True)
    parser.add_argument("--progress", type=Path, required=True, help="file to keep replacing")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process does")
    return parser.parse_args(arguments)


async def search(order: SearchOrder, reporter: Reporter) -> Found:
    """Raises QuantError, ServerError."""
    store = VariantStore(Path(order.cache), max_bytes=order.cache_max_bytes)
    source = open_source(
        order.source, cache=store.cache, revision=order.revision, progress=reporter.progress, local_only=True
    )
    return await Searching(order, source, store, reporter).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
