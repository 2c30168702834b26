"""GGUF models through llama.cpp. Importing this module loads neither llama.cpp nor numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from server.backends.llama.options import PAGE, Options, cells, parse_options
from server.backends.llama.threads import allowed_threads
from server.engine.step import Executor
from server.errors import OpenError, RequestError
from server.types import Limits, ModelText, Open

if TYPE_CHECKING:
    from server.backends.llama.embedder import LlamaEmbedder
    from server.backends.llama.model import LlamaModel

MOST_SLOTS = 256  # llama.cpp's own limit of sequences in one context


@dataclass(frozen=True)
class LlamaOpened:
    executor: Executor
    text: ModelText | None
    model: "LlamaModel"
    embedder: "LlamaEmbedder"

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if self.text is None:
            raise RequestError("this model's tokenizer is not in the engine")
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)


class LlamaBackend:
    name = "llama"
    formats = frozenset({"gguf"})

    def probe(self) -> str | None:
        return None if find_spec("llama_cpp") else "llama-cpp-python is not installed"

    def open(self, spec: Open, progress: Callable[[float], None]) -> LlamaOpened:
        """`spec.variant`: a folder with model.gguf, or a .gguf file. See options.Options for `spec.options`.

        The engine has the tokenizer where there is no tokenizer.json beside the model. Raises OpenError.
        """
        from server.backends.llama.context import LlamaContext
        from server.backends.llama.embedder import LlamaEmbedder
        from server.backends.llama.executor import LlamaExecutor
        from server.backends.llama.model import LlamaModel

        options = parse_options(spec.options)
        path, tokenizer_beside = _locate(Path(spec.variant))
        model = LlamaModel(path, options.gpu_layers, progress)
        try:
            limits = limits_for(spec, options, model.context)
            threads = spec.threads or allowed_threads()
            context = LlamaContext(model, limits, options.kv_type or model.kv_type, threads)
        except OpenError:
            model.close()
            raise
        text = None if tokenizer_beside else model.text()
        embedder = LlamaEmbedder(model, limits.context, threads)
        executor = LlamaExecutor(model, context, limits)
        return LlamaOpened(executor, text, model, embedder)


def _locate(variant: Path) -> tuple[Path, bool]:
    """The GGUF file, and whether the web process has a tokenizer for it. Raises OpenError."""
    path = variant / "model.gguf" if variant.is_dir() else variant
    if not path.is_file():
        raise OpenError(f"{path.name} is not there")
    return path, path != variant and (variant / "tokenizer.json").is_file()


def limits_for(spec: Open, options: Options, model_context: int) -> Limits:
    """What the engine will hold. Raises OpenError for a combination that cannot work."""
    context = spec.context or model_context
    slots, kv_tokens = _memory(spec, options, context)
    step_tokens = min(max(options.step_tokens, spec.parallel + PAGE), cells(kv_tokens))
    if slots > MOST_SLOTS:
        raise OpenError(f"{slots} slots; llama.cpp holds at most {MOST_SLOTS} sequences")
    try:
        return Limits(
            running=spec.parallel,
            slots=slots,
            context=context,
            kv_tokens=kv_tokens,
            step_tokens=step_tokens,
            page=PAGE,
            deterministic=options.deterministic,
        )
    except ValueError as error:
        raise OpenError(str(error)) from None


def _memory(spec: Open, options: Options, context: int) -> tuple[int, int]:
    """Slots and KV tokens: by default a context for each running sequence, finished ones staying in theirs.

    Memory that is given in tokens is shared by all slots, so more of them cost nothing.
    """
    if options.deterministic and spec.kv_tokens is not None:
        raise OpenError("deterministic needs a memory for each slot: leave kv_tokens out")
    if spec.kv_tokens is None:
        slots = options.slots or spec.parallel
        return slots, slots * context
    spare = max(4, spec.parallel // 2)
    return options.slots or min(MOST_SLOTS, spec.parallel + spare), spec.kv_tokens


LLAMA = LlamaBackend()
