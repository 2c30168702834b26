"""What a backend tells about itself before anything heavy is imported."""

from collections.abc import Callable, Sequence
from typing import Protocol

from server.engine.step import Executor
from server.types import ModelText, Open


class Embedder(Protocol):
    """Makes embeddings with the weights of an executor, in KV memory of its own."""

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        ...

    def embed(self, tokens: Sequence[int]) -> bytes:
        """Of at least one and at most a context of tokens: float32, little-endian, of length 1.

        Raises StepFailed.
        """
        ...

    def close(self) -> None:
        """Called before the executor's."""
        ...


class Opened(Protocol):
    """An executor and, for models without a tokenizer.json, the engine's own tokenizer."""

    @property
    def executor(self) -> Executor: ...

    @property
    def text(self) -> ModelText | None: ...

    @property
    def embedder(self) -> Embedder | None:
        """None where this backend makes no embeddings."""
        ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Raises RequestError where `text` is None (the web process tokenizes)."""
        ...


class Backend(Protocol):
    """One way to run a format. Importing the module that defines it must cost nothing heavy."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> frozenset[str]:
        """Formats of a manifest that it can open."""
        ...

    def probe(self) -> str | None:
        """None where this machine can run it, otherwise one line that says why not."""
        ...

    def open(self, spec: Open, progress: Callable[[float], None]) -> Opened:
        """Load the variant; `progress` takes 0 to 1. Raises OpenError."""
        ...
