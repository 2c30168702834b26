"""What rendering a chat template may use up. A thread cannot be killed, so the template stops itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import thread_time
from typing import Any

MAX_STEPS = 2_000_000  # loop rounds, calls, filters and walked items; a message costs about twenty
MAX_CHARS = 128 << 20  # characters of every string made on the way, together
MAX_OUTPUT = 8 << 20  # characters of the result
MAX_SECONDS = 2.0  # of this thread's own CPU time: waiting for a busy machine is not the template's fault
CLOCK_EVERY = 256  # steps

CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class LimitReached(Exception):
    """Its message says which limit, as the end of a sentence."""


class Budget:
    """Counts down. Every method raises LimitReached when there is nothing left."""

    def __init__(
        self, *, steps: int = MAX_STEPS, chars: int = MAX_CHARS, seconds: float = MAX_SECONDS
    ) -> None:
        self._steps = steps
        self._chars = chars
        self._next_look = steps - CLOCK_EVERY
        self._end = thread_time() + seconds

    def step(self, count: int = 1) -> None:
        self._steps -= count
        if self._steps > self._next_look:
            return
        self._next_look = self._steps - CLOCK_EVERY
        if self._steps < 0:
            raise LimitReached("takes too many steps")
        if thread_time() > self._end:
            raise LimitReached("takes too long")

    def chars(self, count: int) -> None:
        """Called before so many characters or list items are made, wherever that can be foreseen."""
        self._chars -= count
        if self._chars < 0:
            raise LimitReached("makes too much text")

    def weigh(self, value: object) -> int:
        """Walk a container and say about how long it would print.

        A container that holds another many times over is as large as what it prints, so that a template
        cannot build one of exponential size out of few parts.
        """
        if isinstance(value, str | bytes):
            return len(value)
        total, waiting = 1, [value] if isinstance(value, CONTAINERS) else []
        while waiting:
            item = waiting.pop()
            parts = [part for pair in item.items() for part in pair] if isinstance(item, dict) else item
            self.step(1 + len(parts) // 8)
            for part in parts:
                if isinstance(part, str):
                    total += len(part)
                elif isinstance(part, CONTAINERS):
                    waiting.append(part)
            total += len(parts)
        return total

    def made(self, value: object) -> None:
        """Charge what a call, a filter or a literal gave."""
        if isinstance(value, str | bytes):
            self.chars(len(value))
        elif isinstance(value, CONTAINERS):
            self.weigh(value)


_current: ContextVar[Budget] = ContextVar("budget")


def current() -> Budget:
    return _current.get()


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """What is rendered inside is charged to `budget`."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)
