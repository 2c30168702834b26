"""A `llama_context`: KV memory for many sequences and one forward pass over their new tokens."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.backends.llama.batch import TokenBatch
from server.backends.llama.model import LlamaModel
from server.backends.llama.native import NATIVE_LOG
from server.backends.llama.options import cells
from server.backends.llama.threads import useful_threads
from server.engine.step import CopyPrefix, Release, SlotOp, StepFailed, Trim
from server.errors import OpenError
from server.types import Limits

OUTPUT_BYTES = 64 << 20  # for the logits of one pass, if scored prompts ask for many


class Threads:
    """Gives each pass of a `llama_context` as many threads as make it faster."""

    def __init__(self, model: LlamaModel, handle: Any, allowed: int) -> None:
        self._model, self._handle, self._allowed = model, handle, allowed
        self._set = allowed

    def for_pass(self, batch: TokenBatch) -> None:
        count = useful_threads(self._allowed, self._model.read_by(batch.size, batch.attended))
        if count != self._set:
            self._model.library.llama_set_n_threads(self._handle, count, count)
            self._set = count


class LlamaContext:
    """Owns a `llama_context`. One pass may have up to `step_tokens` tokens and `outputs` rows of logits."""

    def __init__(self, model: LlamaModel, limits: Limits, kv_type: str, threads: int) -> None:
        """Raises OpenError where llama.cpp cannot build it (memory, KV type, architecture)."""
        self._library = model.library
        self._vocab_size = model.vocab_size
        affordable = OUTPUT_BYTES // (4 * model.vocab_size)
        self.outputs = max(limits.slots, min(limits.step_tokens, affordable))
        params = self._params(limits)
        # flash attention rounds to 16 bits inside, and F32 KV is asked for by those who want none of that
        flash = kv_type != "f32"
        params.flash_attn_type = (
            self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash
            else self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(self._library, f"GGML_TYPE_{kv_type.upper()}")
        NATIVE_LOG.forget()
        self._handle: Any = self._library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise OpenError(f"cannot set up the model: {NATIVE_LOG.reason('llama.cpp gives no reason')}")
        self._memory = self._library.llama_get_memory(self._handle)
        self.batch = TokenBatch(self._library, limits.step_tokens, limits.context)
        self._threads = Threads(model, self._handle, threads)
        self._address = 0
        self._rows: NDArray[np.float32] = np.zeros((0, self._vocab_size), np.float32)

    def _params(self, limits: Limits) -> Any:
        params = self._library.llama_context_default_params()
        # Where every slot may hold a whole context, each gets a memory of its own: attention then never walks
        # over other sequences' tokens. Scarcer memory is shared by all slots.
        self._separate = limits.kv_tokens >= limits.slots * limits.context
        params.kv_unified = not self._separate
        params.n_ctx = limits.slots * cells(limits.context) if self._separate else cells(limits.kv_tokens)
        params.n_batch = params.n_ubatch = limits.step_tokens
        params.n_seq_max = limits.slots
        params.n_outputs_max = self.outputs
        params.no_perf = True
        return params

    def close(self) -> None:
        if self._handle:
            self._rows = np.zeros((0, self._vocab_size), np.float32)
            self._library.llama_free(self._handle)
            self._handle = None

    def apply(self, op: SlotOp) -> None:
        match op:
            case Release(slot):
                self.cut(slot, 0)
            case Trim(slot, keep):
                self.cut(slot, keep)
            case CopyPrefix(source, target, count):
                self._copy(source, target, count)

    def _copy(self, source: int, target: int, count: int) -> None:
        if not self._separate:
            self._library.llama_memory_seq_cp(self._memory, source, target, 0, count)
            return
        # between memories llama.cpp copies whole ones only, at the start of the next pass
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.cut(target, count)

    def cut(self, slot: int, keep: int) -> None:
        """Forget the slot's positions from `keep` on. Positions of other slots that share them stay."""
        self._library.llama_memory_seq_rm(self._memory, slot, keep, -1)

    def decode(self) -> None:
        """Run the model over the batch. Raises StepFailed; KV memory may then hold some of its tokens."""
        NATIVE_LOG.forget()
        self._threads.for_pass(self.batch)
        code = self._library.llama_decode(self._handle, self.batch.native)
        if code == 0:
            return
        if code == 1:
            raise StepFailed("KV memory has no room for this step")
        raise StepFailed(f"llama_decode: code {code}: {NATIVE_LOG.reason('no reason given')}")

    def logits(self, count: int) -> NDArray[np.float32]:
        """The logits asked for, in the order of the batch: (count, vocabulary).

        Valid until the next `decode`: a view of llama.cpp's own memory, which moves only when it grows.
        """
        pointer = self._library.llama_get_logits(self._handle)
        address = ctypes.addressof(pointer.contents)
        if address != self._address or count > len(self._rows):
            size = count * self._vocab_size
            values = np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
            self._address, self._rows = address, values.reshape(count, self._vocab_size)
        return self._rows[:count]
