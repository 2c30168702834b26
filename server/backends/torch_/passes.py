"""A step cut into forward passes: rows together, but where they must be alone or score too much at once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from server.backends.torch_.kv import PAGE
from server.engine.step import Row


class Span(NamedTuple):
    """Tokens `low` to `high` of the batch's row number `number`, computed in one pass."""

    number: int
    row: Row
    low: int
    high: int
    scored: int  # so many of them, the first ones, score the prompt token that follows
    samples: bool

    @property
    def size(self) -> int:
        return self.high - self.low

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.row.start + self.low

    @property
    def outputs(self) -> int:
        return self.scored + self.samples


def passes(rows: tuple[Row, ...], outputs: int) -> Iterator[list[Span]]:
    """Forward passes of at most so many rows of logits each, in each the single tokens before the chunks.

    The rows of one pass round each other's sums differently. A reproducible row is computed alone, a prompt
    page by page, so that its numbers depend on nothing but itself.
    """
    alone = [row.sequence.params.reproducible for row in rows]
    yield from _together(((n, row) for n, row in enumerate(rows) if not alone[n]), outputs)
    for number, row in enumerate(rows):
        if alone[number]:
            yield from _pieces(number, row, outputs)


def _together(rows: Iterable[tuple[int, Row]], outputs: int) -> Iterator[list[Span]]:
    spans: list[Span] = []
    room = outputs
    for number, row in sorted(rows, key=lambda pair: len(pair[1].tokens) > 1):
        for span in _spans(number, row, outputs):
            if span.outputs > room or span.low:  # a row's second part needs its first in the cache
                yield _ordered(spans)
                spans, room = [], outputs
            spans.append(span)
            room -= span.outputs
    if spans:
        yield _ordered(spans)


def _ordered(spans: list[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span.size > 1)


def _spans(number: int, row: Row, outputs: int) -> Iterator[Span]:
    """The whole row, unless it scores more than fits into a pass."""
    low, size = 0, len(row.tokens)
    scores = bool(_scored(row, 0, size))
    while low < size:
        high = min(size, low + max(1, outputs - 1)) if scores else size
        yield Span(number, row, low, high, _scored(row, low, high), row.samples and high == size)
        low = high


def _pieces(number: int, row: Row, outputs: int) -> Iterator[list[Span]]:
    low, size = 0, len(row.tokens)
    while low < size:
        high = min(size, low + min(max(1, outputs - 1), _piece(row, row.start + low)))
        yield [Span(number, row, low, high, _scored(row, low, high), row.samples and high == size)]
        low = high


def _piece(row: Row, position: int) -> int:
    """Tokens of the piece that starts there. An answer computed again is so token by token, as it was."""
    left = row.sequence.prompt_tokens - position
    return min(PAGE - position % PAGE, left) if left > 0 else 1


def _scored(row: Row, low: int, high: int) -> int:
    """How many of the row's tokens `low` to `high` score the prompt token that follows them."""
    if not row.wants_prompt_logprobs:
        return 0
    return max(0, min(high, row.sequence.prompt_tokens - 1 - row.start) - low)
