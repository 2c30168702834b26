"""Which slot holds which page of KV memory. Counting only: the executor has the memory itself.

A page shared by several slots is full and never written again, because prefixes are shared and slots
trimmed at page borders only. So no copy on write is needed anywhere.
"""

from collections import Counter
from collections.abc import Iterable


class PageLedger:
    def __init__(self, pages: int, page: int) -> None:
        self.page = page
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._slots: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used_tokens(self) -> int:
        return (self.total - self.free) * self.page

    def held(self, slot: int) -> int:
        """Pages of the slot, shared ones included."""
        return len(self._slots.get(slot, ()))

    def missing(self, slot: int, tokens: int) -> int:
        """Pages that the slot lacks to hold so many tokens."""
        return max(0, -(-tokens // self.page) - self.held(slot))

    def grow(self, slot: int, tokens: int) -> None:
        """Let the slot hold so many tokens. The caller has made sure that `missing` pages are free."""
        pages = self._slots.setdefault(slot, [])
        for _ in range(self.missing(slot, tokens)):
            page = self._free.pop()
            self._holders[page] = 1
            pages.append(page)

    def share(self, source: int, target: int, tokens: int) -> None:
        """The empty slot `target` starts with the first `tokens`, whole pages, of `source`."""
        assert tokens % self.page == 0, "prefixes are shared in whole pages"
        assert not self._slots.get(target), "the target of a shared prefix is empty"
        shared = self._slots[source][: tokens // self.page]
        for page in shared:
            self._holders[page] += 1
        self._slots[target] = list(shared)

    def trim(self, slot: int, tokens: int) -> None:
        """Keep the first `tokens`, whole pages, of the slot."""
        assert tokens % self.page == 0, "slots are trimmed at page borders"
        pages = self._slots.get(slot, [])
        keep = tokens // self.page
        for page in pages[keep:]:
            self._drop(page)
        del pages[keep:]

    def release(self, slot: int) -> None:
        for page in self._slots.pop(slot, ()):
            self._drop(page)

    def reclaimable(self, slots: Iterable[int]) -> int:
        """Pages that would be free if all these slots were released."""
        held = Counter(page for slot in slots for page in self._slots.get(slot, ()))
        return sum(count == self._holders[page] for page, count in held.items())

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)
