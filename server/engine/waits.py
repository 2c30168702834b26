"""How long each request waits for its slot, which its first event tells."""

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from server.types import Event, Failed, Tokens


class Waits:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock  # seconds
        self._since: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    def arrived(self, request_id: str) -> None:
        self._since[request_id] = self._clock()

    def begun(self, request_ids: Iterable[str]) -> None:
        """They have their slots. Only the first time counts."""
        for request_id in request_ids:
            if (since := self._since.pop(request_id, None)) is not None:
                self._waited[request_id] = self._clock() - since

    def told(self, event: Event) -> Event:
        """The event, with the wait where it is its request's first. Nothing is kept of what ended."""
        if isinstance(event, Tokens) and event.cached_tokens is not None:
            self._since.pop(event.id, None)
            return replace(event, waited_s=self._waited.pop(event.id, 0.0))
        if isinstance(event, Failed) or (isinstance(event, Tokens) and event.finish is not None):
            self._since.pop(event.id, None)
            self._waited.pop(event.id, None)
        return event
