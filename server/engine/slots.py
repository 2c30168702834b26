"""Who holds which slot, and the operations that this asks of the executor.

A slot is free, cached (it keeps what a finished or preempted sequence computed, least recently used first)
or held by a running sequence.
"""

from collections.abc import Collection, Iterable

from server.engine.ledger import PageLedger
from server.engine.prefix import Family, Resident, best_match
from server.engine.step import CopyPrefix, Release, SlotOp, Trim
from server.types import Limits


class SlotPool:
    def __init__(self, limits: Limits) -> None:
        self.page = limits.page
        self.ledger = PageLedger(-(-limits.kv_tokens // limits.page), limits.page)
        self.cached: dict[int, Resident] = {}  # by slot, least recently used first
        self.free = list(range(limits.slots))
        self._ops: list[SlotOp] = []

    def take_ops(self) -> tuple[SlotOp, ...]:
        """What the executor has to do before the rows of the next batch."""
        ops, self._ops = tuple(self._ops), []
        return ops

    # -- sequences come and go --------------------------------------------------------------------

    def match(
        self, tokens: list[int], family: Family, active: Iterable[Resident]
    ) -> tuple[Resident | None, int]:
        """The cached or active resident that shares most with `tokens`, and how much, in whole pages."""
        match, length = best_match(tokens, family, [*self.cached.values(), *active])
        length -= length % self.page
        return (match, length) if length else (None, 0)

    def fits(self, tokens: int, shared: int) -> bool:
        """So many tokens, `shared` of which are at hand, have room, if need be in place of cached prefixes.

        A prefix to start from is counted as gone with them, which errs on the safe side.
        """
        wanted = -(-tokens // self.page)
        if self.ledger.free + shared // self.page >= wanted:
            return True
        return self.ledger.free + self.ledger.reclaimable(self.cached) >= wanted

    def occupy(self, match: Resident | None, shared: int, running: Collection[int]) -> int:
        """A slot that holds the first `shared` tokens of `match`. At least one slot is free or cached."""
        slot = self._choose(match, shared, running)
        if match is None:
            return slot
        if slot == match.slot:
            del self.cached[slot]
            self._trim(slot, shared)
            return slot
        if match.slot in self.cached:
            self.cached[match.slot] = self.cached.pop(match.slot)  # recently used
        self.ledger.share(match.slot, slot, shared)
        self._ops.append(CopyPrefix(match.slot, slot, shared))
        return slot

    def vacate(self, resident: Resident, *, keep: bool = True) -> None:
        """A sequence leaves its slot; what it computed stays as a prefix if it fills a page."""
        self.cached[resident.slot] = resident
        if not keep or resident.held < self.page:
            self._evict(resident.slot)

    def _choose(self, match: Resident | None, shared: int, running: Collection[int]) -> int:
        """The matching slot itself where nothing worth keeping is lost, else a free or a stale one."""
        if match is not None and match.slot in self.cached:
            rest = match.held - shared
            if rest < self.page or not (self.free or len(self.cached) > 1):
                return match.slot
        if not self.free:
            others = [slot for slot in self.cached if match is None or slot != match.slot]
            self._evict(nearest(others[: (len(others) + 1) // 2], running))
        slot = nearest(self.free, running)
        self.free.remove(slot)
        return slot

    # -- memory -----------------------------------------------------------------------------------

    def has_room(self, slot: int, tokens: int) -> bool:
        """Whether the slot can grow to so many tokens now; makes room from cached prefixes if it must."""
        while self.ledger.free < self.ledger.missing(slot, tokens):
            if not self.cached:
                return False
            self._shrink_stalest()
        return True

    def grow(self, slot: int, tokens: int) -> None:
        """After `has_room` said so."""
        self.ledger.grow(slot, tokens)

    def _shrink_stalest(self) -> None:
        """Drop the last page of the least recently used prefix."""
        slot, resident = next(iter(self.cached.items()))
        keep = (resident.held - 1) // self.page * self.page
        if keep == 0:
            self._evict(slot)
            return
        resident.held = keep
        self._trim(slot, keep)

    def _trim(self, slot: int, keep: int) -> None:
        self.ledger.trim(slot, keep)
        if self._ops and isinstance(last := self._ops[-1], Trim) and last.slot == slot:
            self._ops.pop()
        self._ops.append(Trim(slot, keep))

    def _evict(self, slot: int) -> None:
        del self.cached[slot]
        self.ledger.release(slot)
        self._ops.append(Release(slot))
        self.free.append(slot)


def nearest(slots: list[int], running: Collection[int]) -> int:
    """The slot next to running ones, which some executors compute together; else the first of the list."""
    return min(slots, key=lambda slot: min((abs(slot - other) for other in running), default=0))
