from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.ledger import PageLedger

PAGES, PAGE = 12, 4
slots = st.integers(0, 4)


class Ledger(RuleBasedStateMachine):
    """The ledger against a model that keeps each slot's pages as objects."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(PAGES, PAGE)
        self.model: dict[int, list[object]] = {}

    @rule(slot=slots, tokens=st.integers(1, 20))
    def grow(self, slot: int, tokens: int) -> None:
        if self.ledger.missing(slot, tokens) <= self.ledger.free:
            self.ledger.grow(slot, tokens)
            pages = self.model.setdefault(slot, [])
            while len(pages) * PAGE < tokens:
                pages.append(object())

    @rule(source=slots, heir=slots, pages=st.integers(0, 5))
    @precondition(lambda self: self.model)
    def share(self, source: int, heir: int, pages: int) -> None:
        if source in self.model and not self.model.get(heir):
            self.ledger.share(source, heir, pages * PAGE)
            self.model[heir] = self.model[source][:pages]

    @rule(slot=slots, pages=st.integers(0, 5))
    def trim(self, slot: int, pages: int) -> None:
        self.ledger.trim(slot, pages * PAGE)
        if slot in self.model:
            del self.model[slot][pages:]

    @rule(slot=slots)
    def release(self, slot: int) -> None:
        self.ledger.release(slot)
        self.model.pop(slot, None)

    @rule(picked=st.sets(slots))
    def reclaimable(self, picked: set[int]) -> None:
        kept = {page for slot, pages in self.model.items() if slot not in picked for page in pages}
        dropped = {page for slot in picked for page in self.model.get(slot, [])}
        assert self.ledger.reclaimable(picked) == len(dropped - kept)

    @invariant()
    def counts_agree(self) -> None:
        used = {page for pages in self.model.values() for page in pages}
        assert self.ledger.free == PAGES - len(used)
        assert self.ledger.used_tokens == len(used) * PAGE
        for slot, pages in self.model.items():
            assert self.ledger.held(slot) == len(pages)


TestLedger = Ledger.TestCase
