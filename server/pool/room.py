"""Whether a loaded engine has memory for what a request asks of it, beyond what plain requests do.

It gets more where there is some, or where idle engines can go for it. Where others are busy, the engine is
itself unloaded as soon as it is idle and is loaded again with more room, in turn with all other loads.
"""

import time

from server.pool.estimate import RAM
from server.pool.loader import Loaded
from server.pool.memory import PATIENCE_S, Memory, NoRoom
from server.pool.uses import NONE, Use, extra


class Room:
    def __init__(self, id: str, memory: Memory) -> None:
        self.uses = NONE  # that were asked for: the next engine gets room for them, if there is enough
        self.renews = False  # the engine takes no requests, and is unloaded when it is idle
        self._id = id
        self._memory = memory
        self._since: float | None = None  # when others were busy first

    def unloaded(self) -> None:
        self.renews, self._since = False, None

    def allows(self, loaded: Loaded, uses: frozenset[Use]) -> bool:
        """Raises NoRoom for what never fits."""
        lacking = uses - loaded.uses
        if self.renews or not lacking:
            return not self.renews
        more = extra(lacking, loaded.extras)
        if loaded.claim.bytes[RAM] + more > self._memory.budgets[RAM]:
            self._make_way(loaded, uses)
            return False
        growth = self._memory.grow(loaded.claim, {RAM: more}, lacking)
        if growth == "no":
            now = time.monotonic()
            self._since = self._since or now
            self.renews = now - self._since >= PATIENCE_S
        return growth == "granted"

    def _make_way(self, loaded: Loaded, uses: frozenset[Use]) -> None:
        """Not beside what it was used for before: for an engine for these uses alone. Raises NoRoom."""
        plain = loaded.claim.bytes[RAM] - extra(loaded.claim.uses, loaded.extras)
        if plain + extra(uses, loaded.extras) > self._memory.budgets[RAM]:
            self.uses -= uses
            text = f"{self._id} needs more memory for this kind of request than the budget is"
            raise NoRoom(text, never=True)
        self.uses, self.renews = uses, True
