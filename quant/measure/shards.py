"""References that grow: some texts at a time, each group one file, computed once for a source and a text.

<cache>/references/<key>/00000.safetensors, 00001.safetensors, ...   what the source says
                         greedy.json                                 its answers without chance
                         structured.json                             those to tasks of JSON and calls
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from quant.canonical import canonical_digest
from quant.errors import BadSource
from quant.files import replace_synced, sync_file
from quant.locks import lock_file
from quant.measure.score import Expected, Reference
from quant.measure.stored import ARRAYS
from quant.measure.text import Chunk, Text

VERSION = 1  # raised when the same source gives another text or reference


class Answer(Struct, frozen=True, kw_only=True):
    """The source's greedy answer to one prompt."""

    prompt: int  # its number in the set
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """`prompts`: the number of each chunk's prompt; none where the text is a corpus."""

    reference: Reference
    prompts: tuple[int, ...]


class ReferenceShelf:
    """`what` says all that the text and the reference depend on."""

    def __init__(self, cache: Path, what: list[object]) -> None:
        key = canonical_digest([VERSION, *what])[:32]
        self.folder = cache / "references" / key
        self._lock = cache / "locks" / f"reference-{key}"

    @contextmanager
    def extending(self) -> Iterator[None]:
        """Only one process at a time computes what is missing."""
        with lock_file(self._lock):
            self.folder.mkdir(parents=True, exist_ok=True)
            yield

    def shard(self, number: int) -> Shard | None:
        """None where it is not there, or damaged."""
        path = self._path(number)
        try:
            return _load(path) if path.exists() else None
        except BadSource:
            return None

    def add(self, number: int, shard: Shard) -> None:
        """A crash leaves the file whole or not at all."""
        from safetensors.numpy import save_file

        reference = shard.reference
        arrays = {
            name: np.concatenate([getattr(chunk, name) for chunk in reference.chunks]) for name in ARRAYS
        }
        chunks = reference.text.chunks
        arrays |= {
            "chunk_tokens": np.concatenate([np.array(chunk.tokens, np.int32) for chunk in chunks]),
            "chunk_sizes": np.array([len(chunk.tokens) for chunk in chunks], np.int32),
            "chunk_firsts": np.array([chunk.first for chunk in chunks], np.int32),
            "prompts": np.array(shard.prompts, np.int32),
        }
        about = {
            "corpus": reference.text.corpus,
            "tokenizer": reference.text.tokenizer,
            "cut": reference.text.cut,
        }
        fresh = self._path(number).with_suffix(".new")
        save_file(arrays, fresh, metadata=about)
        sync_file(fresh)
        fresh.rename(self._path(number))

    def greedy(self) -> tuple[Answer, ...]:
        try:
            return msgspec.json.decode((self.folder / "greedy.json").read_bytes(), type=tuple[Answer, ...])
        except (OSError, msgspec.DecodeError):
            return ()

    def add_greedy(self, answers: tuple[Answer, ...]) -> None:
        replace_synced(self.folder / "greedy.json", msgspec.json.encode(answers))

    def structured(self) -> tuple[Answer, ...]:
        try:
            data = (self.folder / "structured.json").read_bytes()
            return msgspec.json.decode(data, type=tuple[Answer, ...])
        except (OSError, msgspec.DecodeError):
            return ()

    def add_structured(self, answers: tuple[Answer, ...]) -> None:
        replace_synced(self.folder / "structured.json", msgspec.json.encode(answers))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"


def joined(references: list[Reference]) -> Reference:
    """One after the other; at least one."""
    first = references[0].text
    chunks = tuple(chunk for one in references for chunk in one.text.chunks)
    text = Text(chunks=chunks, corpus=first.corpus, tokenizer=first.tokenizer, cut=first.cut)
    return Reference(text, tuple(chunk for one in references for chunk in one.chunks))


def _load(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        text = _text(arrays, about)
        cuts = np.cumsum([chunk.scored for chunk in text.chunks])[:-1]
        parts = [np.split(arrays[name], cuts) for name in ARRAYS]
        expected = tuple(Expected(*chunk) for chunk in zip(*parts, strict=True))
        return Shard(Reference(text, expected), tuple(arrays["prompts"].tolist()))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadSource(f"{path.name} is no stored reference") from error


def _text(arrays: dict[str, np.ndarray], about: dict[str, str]) -> Text:
    runs = np.split(arrays["chunk_tokens"], np.cumsum(arrays["chunk_sizes"])[:-1])
    pairs = zip(runs, arrays["chunk_firsts"].tolist(), strict=True)
    chunks = tuple(Chunk(tuple(run.tolist()), first) for run, first in pairs)
    return Text(chunks=chunks, corpus=about["corpus"], tokenizer=about["tokenizer"], cut=about["cut"])
