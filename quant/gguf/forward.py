"""One text after another through a GGUF model: the logits of every position, or what flows into its matrices.

Exact rather than quick: F32 keys and values and no flash attention, which rounds to 16 bits inside.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from quant.errors import BadSource, BuildFailed
from quant.gguf.native import captured, library

Logits = npt.NDArray[np.float32]
Watch = Callable[
    [int, bool], bool
]  # (address of a ggml_tensor, asked before it is computed) -> wanted, go on
LEAST_CONTEXT = 256  # llama.cpp rounds up to it


class Forward:
    """Owns a model and a context of one sequence. Close it, or use it in a `with` block."""

    def __init__(
        self, path: Path, *, context: int, threads: int | None = None, watch: Watch | None = None
    ) -> None:
        """`context`: tokens of the longest text. Raises BadSource where llama.cpp cannot open the file."""
        self._library = library()
        with captured() as log:
            self._model = self._load(path)
            self._handle = self._model and self._start(context, threads, watch)
        if not self._handle:
            self.close()
            reason = log.errors[-1].replace(str(path), path.name) if log.errors else "no reason given"
            raise BadSource(f"llama.cpp cannot open {path.name}: {reason}")
        self._memory = self._library.llama_get_memory(self._handle)
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._library.llama_vocab_n_tokens(self._vocab)
        self._batch = self._library.llama_batch_init(context, 0, 1)
        self._room = context

    def _load(self, path: Path) -> Any:
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        return self._library.llama_model_load_from_file(os.fsencode(path), params)

    def _start(self, context: int, threads: int | None, watch: Watch | None) -> Any:
        native = self._library
        params = native.llama_context_default_params()
        params.n_ctx = max(context, LEAST_CONTEXT)
        params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads or len(os.sched_getaffinity(0))
        params.type_k = params.type_v = native.GGML_TYPE_F32
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        if watch:
            self._callback = native.ggml_backend_sched_eval_callback(lambda at, ask, _: watch(at, ask))
            params.cb_eval = self._callback
        return native.llama_init_from_model(self._model, params)

    @property
    def begins_with(self) -> int | None:
        """The token that a text begins with, where the model wants one."""
        adds = self._library.llama_vocab_get_add_bos(self._vocab)
        return int(self._library.llama_vocab_bos(self._vocab)) if adds else None

    def __call__(self, tokens: Sequence[int]) -> Logits:
        """[tokens, vocabulary], of the text alone. A view that the next call overwrites."""
        if not 0 < len(tokens) <= self._room:
            raise ValueError(f"{len(tokens)} tokens; there is room for 1 to {self._room}")
        self._library.llama_memory_clear(self._memory, True)
        self._fill(tokens)
        with captured() as log:
            code = self._library.llama_decode(self._handle, self._batch)
        if code:
            raise BuildFailed(f"llama.cpp could not compute a text: {log.errors[-1] if log.errors else code}")
        pointer = self._library.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(pointer, (len(tokens), self.vocabulary))

    def _fill(self, tokens: Sequence[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True

    def close(self) -> None:
        with captured():  # it tells how much memory it used
            if self._handle:
                self._library.llama_batch_free(self._batch)
                self._library.llama_free(self._handle)
            if self._model:
                self._library.llama_model_free(self._model)
        self._handle = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
