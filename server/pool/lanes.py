"""Whose turn it is: so many at once, by priority, then in the order in which they came."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in a queue; `priority` may change while it waits (smaller is sooner)."""

    priority: int
    number: int
    turn: "asyncio.Future[None]" = field(repr=False)


class Lane:
    def __init__(self, width: int) -> None:
        self._free = width
        self._numbers = itertools.count()
        self._waiting: dict[str, Ticket] = {}

    @contextlib.asynccontextmanager
    async def turn(self, name: str, priority: int) -> AsyncIterator[None]:
        """Inside, `name` is one of those whose turn it is."""
        await self._enter(name, priority)
        try:
            yield
        finally:
            self._free += 1
            self._next()

    def hurry(self, name: str, priority: int) -> None:
        """Move `name` forward, where it still waits; never back."""
        if ticket := self._waiting.get(name):
            ticket.priority = min(ticket.priority, priority)

    async def _enter(self, name: str, priority: int) -> None:
        ticket = Ticket(priority, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting[name] = ticket
        self._next()
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if self._waiting.pop(name, None) is None:  # its turn had just come
                self._free += 1
                self._next()
            raise

    def _next(self) -> None:
        while self._free and self._waiting:
            name = min(
                self._waiting, key=lambda name: (self._waiting[name].priority, self._waiting[name].number)
            )
            self._free -= 1
            self._waiting.pop(name).turn.set_result(None)
