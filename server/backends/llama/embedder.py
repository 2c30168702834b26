"""Embeddings of texts through llama.cpp, in a context of its own that is made for the first of them."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.backends.llama.batch import TokenBatch
from server.backends.llama.context import Threads
from server.backends.llama.model import LlamaModel
from server.backends.llama.native import NATIVE_LOG
from server.backends.llama.options import cells
from server.engine.step import StepFailed

STEP_TOKENS = 64  # each also has its logits computed: memory for a whole context of them would be wasted

Vectors = NDArray[np.float32]

# By llama_pooling_type of the file's metadata. A file that names none is a model that writes text: the mean
# of its last hidden states.
POOLING: dict[str, Callable[[Vectors], Vectors]] = {
    "1": lambda hidden: hidden.mean(axis=0, dtype=np.float32),
    "2": lambda hidden: hidden[0],  # of the first token ("cls")
    "3": lambda hidden: hidden[-1],
}


class LlamaEmbedder:
    """server.backends.base.Embedder. Uses the model's weights; close the model after its last use."""

    def __init__(self, model: LlamaModel, context: int, threads: int) -> None:
        self.width: int = model.library.llama_model_n_embd(model.handle)
        self._model = model
        self._library = model.library
        self._context = context
        self._threads = threads
        self._pool = POOLING.get(model.pooling, POOLING["1"])
        self._handle: Any = None
        self._passes: Threads | None = None
        self._batch = TokenBatch(model.library, STEP_TOKENS, context)

    def embed(self, tokens: Sequence[int]) -> bytes:
        handle = self._open()
        self._library.llama_memory_clear(self._library.llama_get_memory(handle), True)
        parts = [
            self._hidden(handle, tokens[start : start + STEP_TOKENS], start)
            for start in range(0, len(tokens), STEP_TOKENS)
        ]
        vector = self._pool(np.concatenate(parts))
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or not length:
            raise StepFailed("the model's hidden states are no numbers")
        return (vector / length).astype("<f4").tobytes()

    def close(self) -> None:
        if self._handle is not None:
            self._library.llama_free(self._handle)
            self._handle = None

    def _hidden(self, handle: Any, tokens: Sequence[int], start: int) -> Vectors:
        """The last hidden states (tokens, width)."""
        self._batch.clear()
        self._batch.append(tokens, start, 0, len(tokens), True)
        NATIVE_LOG.forget()
        assert self._passes is not None
        self._passes.for_pass(self._batch)
        if code := self._library.llama_decode(handle, self._batch.native):
            raise StepFailed(f"llama_decode: code {code}: {NATIVE_LOG.reason('no reason given')}")
        pointer = self._library.llama_get_embeddings(handle)
        memory = (ctypes.c_float * (len(tokens) * self.width)).from_address(
            ctypes.addressof(pointer.contents)
        )
        return np.ctypeslib.as_array(memory).reshape(len(tokens), self.width).copy()

    def _open(self) -> Any:
        if self._handle is not None:
            return self._handle
        params = self._library.llama_context_default_params()
        params.n_ctx = cells(self._context)
        params.n_batch = params.n_ubatch = params.n_outputs_max = STEP_TOKENS
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self._threads
        params.embeddings = True
        params.pooling_type = self._library.LLAMA_POOLING_TYPE_NONE
        params.no_perf = True
        NATIVE_LOG.forget()
        handle = self._library.llama_init_from_model(self._model.handle, params)
        if not handle:
            raise StepFailed(f"no memory for embeddings: {NATIVE_LOG.reason('llama.cpp gives no reason')}")
        self._handle, self._passes = handle, Threads(self._model, handle, self._threads)
        return handle
