"""A request of many texts holds a part of an engine: its other texts wait here, not in the engine's queue."""

import asyncio

from server.pool.states import Lease


class Share:
    """At most half of the engine's slots, and one at least, for the texts of one request.

    A text that fails keeps its turn: what still waits is not begun between the failure and the request's end.
    """

    def __init__(self, lease: Lease) -> None:
        self._turns = asyncio.Semaphore(max(1, lease.engine.ready.limits.running // 2))

    async def enter(self) -> None:
        """Wait for a turn."""
        await self._turns.acquire()

    def leave(self) -> None:
        """After success, and only then."""
        self._turns.release()
