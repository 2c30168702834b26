"""Responses that a later request may go on with, kept in memory: bounded, and apart for every API key."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.schema.response_answers import ModelResponse
from server.errors import UnknownResponse

MAX_RESPONSES = 4096
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    response: ModelResponse
    messages: list[dict[str, Any]]  # the conversation up to its end, without instructions


class ResponseStore:
    """Forgets the one that nobody asked for the longest. A key sees only what was stored under it."""

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[tuple[str, str], tuple[Stored, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, salt: str, stored: Stored) -> None:
        size = len(msgspec.json.encode((stored.response, stored.messages)))
        key = salt, stored.response.id
        _, replaced = self._held.pop(key, (stored, 0))
        self._held[key] = stored, size
        self.bytes += size - replaced
        while len(self._held) > self._most or self.bytes > self._most_bytes:
            _, (_, forgotten) = self._held.popitem(last=False)
            self.bytes -= forgotten

    def get(self, salt: str, id: str) -> Stored:
        """Raises UnknownResponse."""
        if (salt, id) not in self._held:
            raise UnknownResponse("there is no such response: it was not stored, or is forgotten by now")
        self._held.move_to_end((salt, id))
        return self._held[salt, id][0]

    def delete(self, salt: str, id: str) -> None:
        """Raises UnknownResponse."""
        self.get(salt, id)
        self.bytes -= self._held.pop((salt, id))[1]
