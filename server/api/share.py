"""A request of many texts holds a part of an engine: its other texts wait here, not in the engine's queue."""

import asyncio
from collections import deque

from server.pool.states import Lease


class Share:
    """One text of a request is always under way; further ones begin while less than half of the engine's
    slots are taken, by whomever, so that such requests leave the other half to small ones.

    A text that fails keeps its turn: what still waits is not begun between the failure and the request's end.
    """

    def __init__(self, lease: Lease) -> None:
        self._engine = lease.engine
        self._half = lease.engine.ready.limits.running // 2
        self._under_way = 0
        self._called = 0  # of them, those that have not gone to the engine yet
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for a turn. The text must go to the engine without another wait."""
        if self._waiting or not self._may_begin():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            self._called -= 1
        else:
            self._under_way += 1

    def leave(self) -> None:
        """After success, and only then."""
        self._under_way -= 1
        while self._waiting and self._may_begin():
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                self._under_way += 1
                self._called += 1
                turn.set_result(None)

    def _may_begin(self) -> bool:
        others = self._engine.requests - (self._under_way - self._called)
        return not self._under_way or self._under_way + max(0, others) < self._half
