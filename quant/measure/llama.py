"""GGUF files as scorers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.gguf.forward import Forward
from quant.measure.score import Scorer


@contextmanager
def gguf_scorer(path: Path, *, context: int, threads: int | None = None) -> Iterator[Scorer]:
    """`context`: tokens of the longest chunk. Raises BadSource where llama.cpp cannot open the file."""
    with Forward(path, context=context, threads=threads) as forward:
        yield forward
