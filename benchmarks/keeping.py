"""What benchmarks have computed and need not compute again: texts and comparisons, in files of a cache."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from quant.canonical import canonical_digest, content_digest
from quant.measure.score import Comparison
from quant.measure.text import Chunk

WEIGHTS = ("*.safetensors", "*.gguf")


def kept_chunks(file: Path, make: Callable[[], Sequence[Chunk]]) -> tuple[Chunk, ...]:
    if not file.exists():
        chunks = [(chunk.tokens, chunk.first) for chunk in make()]
        _publish(file, lambda fresh: fresh.write_text(json.dumps(chunks)))
    return tuple(Chunk(tuple(tokens), first) for tokens, first in json.loads(file.read_text()))


def kept_comparison(folder: Path, what: Sequence[str], make: Callable[[], Comparison]) -> Comparison:
    """`what` names everything that the comparison depends on."""
    file = folder / f"{canonical_digest(list(what))[:32]}.npz"
    if not file.exists():
        found = make()
        counts = [len(chunk) for chunk in found.divergence]
        arrays: dict[str, Any] = {
            field.name: np.concatenate(getattr(found, field.name)) for field in fields(Comparison)
        }
        _publish(file, lambda fresh: np.savez(fresh, counts=counts, **arrays))
    with np.load(file) as stored:
        cuts = np.cumsum(stored["counts"])[:-1]
        parts = {field.name: tuple(np.split(stored[field.name], cuts)) for field in fields(Comparison)}
    return Comparison(**parts)


def weights_digest(files: Path) -> str:
    """Of a model's weights: a file, or those of a folder."""
    found = [files] if files.is_file() else sorted(path for kind in WEIGHTS for path in files.glob(kind))
    return canonical_digest([content_digest(path) for path in found])


def _publish(file: Path, write: Callable[[Path], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")  # numpy wants the name to end so
    write(fresh)
    fresh.rename(file)
