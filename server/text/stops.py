"""Stop strings over text that arrives in pieces."""

import re


class StopMatcher:
    """Ends a text before the stop that is complete first; of two that end together, before the longer.

    This does not depend on how the text is cut: `push` decides each character as it comes, with one
    Knuth-Morris-Pratt automaton a stop. Text that may be the beginning of a stop is held back, so that
    nothing of a stop is ever given out. After a match every further push gives nothing.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._borders = [borders(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""
        self._matched: str | None = None
        heads = "".join({re.escape(stop[0]) for stop in self._stops})
        self._head = re.compile(f"[{heads}]") if heads else None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop that ended it, if one did."""
        if self._matched is not None:
            return "", self._matched
        if not self._held and (self._head is None or self._head.search(text) is None):
            return text, None
        buffer = self._held + text
        for position, char in enumerate(text, len(self._held) + 1):
            if (stop := self._step(char)) is not None:
                self._matched, self._held = stop, ""
                return buffer[: position - len(stop)], stop
        keep = len(buffer) - max(self._lengths)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """The end of the text: what was held back was no stop."""
        held, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> str | None:
        found: str | None = None
        for i, stop in enumerate(self._stops):
            length = self._lengths[i] = advance(stop, self._borders[i], self._lengths[i], char)
            if length == len(stop) and len(stop) > len(found or ""):
                found = stop
        return found


def advance(stop: str, border: list[int], length: int, char: str) -> int:
    """How much of the stop the text ends with after one more character."""
    while length and stop[length] != char:
        length = border[length - 1]
    return length + (stop[length] == char)


def borders(stop: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    for i in range(1, len(stop)):
        table[i] = advance(stop, table, table[i - 1], stop[i])
    return table
