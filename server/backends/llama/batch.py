"""The tokens of one forward pass, in the memory layout of `llama_batch`."""

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenBatch:
    """One `llama_batch` for the whole life of an executor, filled through numpy views of its arrays."""

    def __init__(self, library: ModuleType, capacity: int, longest: int) -> None:
        """`longest`: tokens that one sequence may grow to."""
        self.size = 0
        self.attended = 0  # positions that its tokens look at, their own included
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._slots = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._ones = np.ones(capacity, np.int32)
        first, width = self._slots.ctypes.data, self._slots.itemsize
        self._slot_pointers = first + width * np.arange(capacity, dtype=np.uint64)
        self._counting = np.arange(longest + 1, dtype=np.int32)
        self._native: Any = library.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._ones, ctypes.c_int32),
            seq_id=_pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._outputs, ctypes.c_int8),
        )

    @property
    def native(self) -> Any:
        """To be passed to llama_decode by value."""
        self._native.n_tokens = self.size
        return self._native

    def clear(self) -> None:
        self.size = self.attended = 0

    def append(self, tokens: Sequence[int], start: int, slot: int, scored: int, last: bool) -> None:
        """Tokens of one sequence at positions from `start` on.

        Logits are computed after each of the first `scored` tokens, and after the last one if `last`.
        """
        place, count = self.size, len(tokens)
        end = self.size = place + count
        self.attended += count * (start + count)
        if count == 1:  # the row of every running sequence in almost every step
            self._tokens[place], self._positions[place] = tokens[0], start
            self._slots[place], self._outputs[place] = slot, last or scored
            return
        self._tokens[place:end] = tokens
        self._positions[place:end] = self._counting[start : start + count]
        self._slots[place:end] = slot
        self._outputs[place:end] = 0
        self._outputs[place : place + scored] = 1
        if last:
            self._outputs[end - 1] = 1


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
