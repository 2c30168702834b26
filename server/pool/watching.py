"""What a running job tells: reports of how far it is, and the lines that its process writes."""

from collections.abc import Sequence
from typing import Protocol

from server.process.reports import BuildReport


class Watch(Protocol):
    def report(self, report: BuildReport) -> None: ...

    def said(self, lines: Sequence[str]) -> None: ...


class Lines:
    """Text that arrives in pieces, as lines; bounded, whatever a process writes."""

    LONGEST = 500  # characters of a line that are kept
    MOST = 100  # lines between two looks

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[str] = []

    def feed(self, data: bytes) -> None:
        *whole, rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[-4 * self.LONGEST :]
        self._lines += [text for line in whole if (text := _printable(line)[: self.LONGEST].strip())]
        del self._lines[: -self.MOST]

    def take(self) -> list[str]:
        """Those since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _printable(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in text)
