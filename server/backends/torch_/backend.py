"""Hugging Face folders through torch. Importing this module loads neither torch nor transformers.

One executor serves all formats; a backend is a row that says which formats it opens and what that needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from server.backends.base import Embedder
from server.backends.llama.threads import allowed_threads, limit_spinning
from server.backends.torch_.options import parse_options
from server.engine.step import Executor
from server.errors import OpenError, RequestError
from server.types import ModelText, Open


@dataclass(frozen=True)
class TorchOpened:
    executor: Executor
    embedder: Embedder
    text: ModelText | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raise RequestError("this model's tokenizer is not in the engine")


@dataclass(frozen=True)
class TorchBackend:
    name: str
    formats: frozenset[str]

    def probe(self) -> str | None:
        missing = [name for name in ("torch", "transformers") if not find_spec(name)]
        if not missing:
            return None
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"

    def open(self, spec: Open, progress: Callable[[float], None]) -> TorchOpened:
        """`spec.variant`: a Hugging Face folder. See options.Options for `spec.options`. Raises OpenError."""
        options = parse_options(spec.options)
        folder = Path(spec.variant)
        if not folder.is_dir():
            raise OpenError(f"{folder.name} is no folder")
        if (reason := self.probe()) is not None:
            raise OpenError(reason)
        limit_spinning()
        from server.backends.torch_.opening import open_variant

        return TorchOpened(*open_variant(spec, options, allowed_threads(), progress))


PLAIN = TorchBackend("plain", frozenset({"plain"}))
BITSANDBYTES = TorchBackend("bitsandbytes", frozenset({"bnb4", "bnb8"}))
AWQ = TorchBackend("awq", frozenset({"awq"}))
GPTQ = TorchBackend("gptq", frozenset({"gptq"}))
COMPRESSED = TorchBackend("compressed", frozenset({"compressed-tensors", "compressed-tensors-int8"}))
