"""KV memory in pages of 16 tokens: which pages a slot has, who shares them, and the tensors behind them.

`PageTables` counts and knows no tensor; `KVCache` holds the keys and values. The layout of a page is the one
that FlashAttention reads: [page, token in page, KV head, head].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.step import CopyPrefix, Release, SlotOp, Trim

PAGE = 16  # of server.types.Limits


class PageTables:
    """Pages of each slot, counted by how many slots hold them; a page is written only by its sole holder.

    The scheduler promises that there is room. Page 0 belongs to nobody: rows that only fill up a batch write
    there, and table entries that are not in use point to it.
    """

    def __init__(self, pages: int, slots: int, longest: int) -> None:
        """`pages` without page 0; `longest`: tokens that a slot may hold."""
        width = -(-longest // PAGE)
        self.table = np.zeros((slots, width), np.int32)
        self.held = [0] * slots  # tokens in each slot
        self._count = [0] * slots  # pages of each slot
        self._holders = np.zeros(pages + 1, np.int32)
        self._free = list(range(pages, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def pages(self, slot: int) -> NDArray[np.int32]:
        return self.table[slot, : self._count[slot]]

    def sole(self, slot: int) -> NDArray[np.int32]:
        """Pages that no other slot holds."""
        pages = self.pages(slot)
        found: NDArray[np.int32] = pages[self._holders[pages] == 1]
        return found

    def apply(self, op: SlotOp) -> None:
        match op:
            case Release(slot):
                self._cut(slot, 0)
            case Trim(slot, keep):
                self._cut(slot, min(keep, self.held[slot]))
            case CopyPrefix(source, target, count):
                assert not self._count[target], "the target of a copy is empty"
                assert self.held[source] >= count, "the source of a copy holds the prefix"
                shared = self.table[source, : -(-count // PAGE)]
                self._holders[shared] += 1
                self.table[target, : len(shared)] = shared
                self._count[target], self.held[target] = len(shared), count

    def grow(self, slot: int, tokens: int) -> tuple[int, int] | None:
        """Make room for the slot's next tokens, up to `tokens` in all.

        A last page that is begun and shared is given up for a copy: (page to copy from, page to copy to).
        """
        copied = self._own_last(slot)
        while self._count[slot] * PAGE < tokens:
            self._append(slot, self._take())
        self.held[slot] = tokens
        return copied

    def shrink(self, slot: int, keep: int) -> None:
        """Forget tokens that were never computed; pages stay until the slot is released."""
        self.held[slot] = keep

    def _own_last(self, slot: int) -> tuple[int, int] | None:
        last = self.held[slot] // PAGE
        if self.held[slot] % PAGE == 0:
            self._cut(
                slot, self.held[slot]
            )  # pages behind the end are of no use to a slot that may share them
            return None
        old = int(self.table[slot, last])
        if self._holders[old] == 1:
            return None
        new = self._take()
        self._holders[old] -= 1
        self._holders[new] = 1
        self.table[slot, last] = new
        return old, new

    def _take(self) -> int:
        assert self._free, "the scheduler promised memory that is not there"
        return self._free.pop()

    def _append(self, slot: int, page: int) -> None:
        self.table[slot, self._count[slot]] = page
        self._holders[page] = 1
        self._count[slot] += 1

    def _cut(self, slot: int, keep: int) -> None:
        pages = -(-keep // PAGE)
        for page in self.table[slot, pages : self._count[slot]].tolist():
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
        self.table[slot, pages : self._count[slot]] = 0
        self._count[slot], self.held[slot] = min(pages, self._count[slot]), keep


@dataclass(frozen=True, slots=True)
class KVShape:
    layers: int
    heads: int
    head: int  # numbers in one head

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.heads * self.head * dtype.itemsize


class KVCache:
    """Keys and values of all layers. Zeroed: what a mask hides must still be a number."""

    def __init__(self, shape: KVShape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """`pages` without page 0."""
        size = (2, shape.layers, pages + 1, PAGE, shape.heads, shape.head)
        self._all = torch.zeros(size, dtype=dtype, device=device)
        self.keys: Sequence[Tensor] = self._all[0].unbind(0)
        self.values: Sequence[Tensor] = self._all[1].unbind(0)

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """`keys`, `values` [tokens, heads, head] go to `places` [tokens], counted in tokens from page 0."""
        self.keys[layer].flatten(0, 1).index_copy_(0, places, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, places, values)

    def copy_page(self, source: int, target: int) -> None:
        self._all[:, :, target] = self._all[:, :, source]

    def scrub(self, pages: NDArray[np.int32]) -> None:
        """Zero pages that may hold NaN or infinity, which a mask would not keep from their next holder."""
        self._all[:, :, torch.from_numpy(pages.astype(np.int64)).to(self._all.device)] = 0

    def close(self) -> None:
        self._all = torch.empty(0)
        self.keys = self.values = ()
