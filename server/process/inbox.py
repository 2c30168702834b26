"""What an engine has sent for one request and nobody has taken yet.

Tokens that came since the last look are taken together: whoever is behind catches up by one step, whatever
else the event loop has to do. Where more lie here than a reader leaves lying, the engine is told to compute
no more of this request.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from server.errors import EngineDied
from server.types import Event, Tokens

UNREAD = 64  # tokens that may lie here; beyond them the request is held


class Inbox:
    """`hold` is told True when the engine is to stop with this request, False when it is to go on."""

    def __init__(self, hold: Callable[[bool], None]) -> None:
        self._hold = hold
        self._held = False
        self._events: deque[Event | EngineDied] = deque()
        self._unread = 0  # tokens
        self._filled = asyncio.Event()

    def put(self, event: Event | EngineDied) -> None:
        self._events.append(event)
        self._filled.set()
        if isinstance(event, Tokens):
            self._unread += len(event.tokens)
            if self._unread > UNREAD and not self._held and event.finish is None:
                self._set_held(True)

    async def get(self) -> Event | EngineDied:
        """The next event; of tokens, all that are there as one. Only one may wait."""
        await self._filled.wait()
        event = self._events.popleft()
        if isinstance(event, Tokens):
            event = self._all(event)
        if not self._events:
            self._filled.clear()
        return event

    def _all(self, first: Tokens) -> Tokens:
        parts = [first]
        while self._events and isinstance(after := self._events[0], Tokens) and after.finish != "abort":
            parts.append(after)
            self._events.popleft()
        self._unread -= sum(len(part.tokens) for part in parts)
        if self._held:
            self._set_held(False)
        return joined(parts)

    def _set_held(self, held: bool) -> None:
        self._held = held
        self._hold(held)


def joined(parts: list[Tokens]) -> Tokens:
    """Events of one request that follow each other, as one. What the first or the last alone says is kept."""
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return first
    scores = None
    if first.logprobs is not None:
        scores = tuple(score for part in parts for score in part.logprobs or ())
    return replace(
        first,
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=scores,
        finish=last.finish,
        complete=last.complete,
    )


def one_by_one(event: Tokens) -> list[Tokens]:
    """The reverse of `joined`: a token an event."""
    if len(event.tokens) < 2:
        return [event]
    last = len(event.tokens) - 1
    return [
        replace(
            event,
            tokens=(token,),
            logprobs=None if event.logprobs is None else event.logprobs[number : number + 1],
            finish=event.finish if number == last else None,
            complete=event.complete and number == last,
            cached_tokens=None if number else event.cached_tokens,
            waited_s=0.0 if number else event.waited_s,
            prompt_logprobs=None if number else event.prompt_logprobs,
        )
        for number, token in enumerate(event.tokens)
    ]
