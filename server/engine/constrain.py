"""What a sequence may say next. Pure: tokens in, masks out; compiled grammars come from .compiler.

A constraint belongs to one sequence and follows its committed tokens, so that it survives preemption.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from server.types import Reasoning

TOO_COMPLEX = "the grammar became too complex to be followed"


class Constraint(Protocol):
    def mask(self) -> bytes | None:
        """As server.engine.step.Mask, after the tokens taken so far."""
        ...

    def take(self, token: int) -> None:
        """The token that was sampled under the mask."""
        ...

    @property
    def ended(self) -> bool:
        """Nothing may follow: the answer is complete."""
        ...

    @property
    def error(self) -> str | None:
        """Set once the constraint cannot be followed any more: the answer is to be given up."""
        ...


@dataclass(frozen=True)
class Words:
    """The vocabulary as constraints see it."""

    pieces: tuple[bytes, ...]
    control: frozenset[int]  # tokens that are no text
    ends: frozenset[int]  # tokens that end an answer

    def only(self, tokens: Iterable[int]) -> bytes:
        """A mask of these tokens."""
        bits = bytearray(-(-len(self.pieces) // 32) * 4)
        for token in tokens:
            bits[token >> 3] |= 1 << (token & 7)
        return bytes(bits)

    @cached_property
    def no_end(self) -> bytes:
        """A mask of all tokens but those that end an answer."""
        return self.only(token for token in range(len(self.pieces)) if token not in self.ends)

    def spelling(self, text: bytes) -> bytes:
        """A mask of the tokens by which `text`, and perhaps more after it, may begin."""
        return self.only(
            token
            for token, piece in enumerate(self.pieces)
            if piece and (text.startswith(piece) or piece.startswith(text))
        )


class Matcher(Protocol):
    """What is used of llguidance.LLMatcher."""

    def compute_bitmask(self) -> bytes: ...
    def consume_token(self, sampled_token: int) -> bool: ...
    def is_stopped(self) -> bool: ...
    def is_accepting(self) -> bool: ...
    def is_error(self) -> bool: ...


class GrammarConstraint:
    """A grammar from first to last; the tokens that end an answer may follow where it may end."""

    def __init__(self, matcher: Matcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends
        self._mask: bytes | None = None
        self.ended = False
        self.error: str | None = None

    def mask(self) -> bytes | None:
        if self._mask is None and self.error is None:
            mask = self._matcher.compute_bitmask()
            if self._matcher.is_error() or not any(mask):
                self.error = TOO_COMPLEX
            else:
                self._mask = mask
        return self._mask

    def take(self, token: int) -> None:
        self._mask = None
        if self.error is not None or token in self._ends:
            return
        if self._matcher.consume_token(token):
            self.ended = self._matcher.is_stopped() and self._matcher.is_accepting()
        else:
            self.error = TOO_COMPLEX


class ReasoningConstraint:
    """Thoughts of a bounded length, and then what `then` allows.

    Where thoughts begin and end is read from the bytes of the tokens, since a mark has several spellings. An
    answer that does not begin with the opening mark has no thoughts: all of it is under `then`.
    """

    def __init__(self, marks: Reasoning, words: Words, then: Constraint | None) -> None:
        self._marks, self._words, self._then = marks, words, then
        self._open, self._close = marks.open.encode(), marks.close.encode()
        self._state = "thinking" if marks.begun else "beginning"
        self._spent = 0  # tokens of thought
        self._forced = list(marks.close_ids)  # what is left to force
        self._text = b""  # beginning: all so far; thinking: its last bytes

    @property
    def ended(self) -> bool:
        return self._state == "over" and self._then is not None and self._then.ended

    @property
    def error(self) -> str | None:
        return None if self._then is None else self._then.error

    def mask(self) -> bytes | None:
        if self._state == "over":
            return None if self._then is None else self._then.mask()
        if self._state == "beginning":
            return None if self._then is None else self._first(self._then)
        if self._exhausted:
            return self._words.only(self._forced[:1])
        return None if self._then is None else self._words.no_end

    def take(self, token: int) -> None:
        if self._state == "over":
            self._follow(token)
            return
        piece = b"" if token in self._words.ends else self._words.pieces[token]
        if self._state == "beginning":
            self._begin(token, piece)
        else:
            self._think(piece)

    @property
    def _exhausted(self) -> bool:
        return self._marks.budget is not None and self._spent >= self._marks.budget

    def _first(self, then: Constraint) -> bytes | None:
        """The opening mark or what `then` begins with; once the mark has begun, its rest."""
        mark = self._words.spelling(self._open[len(self._text) :])
        mask = b"" if self._text else then.mask()
        if mask is None:
            return None
        size = max(len(mask), len(mark))
        both = int.from_bytes(mark, "little") | int.from_bytes(mask, "little")
        return both.to_bytes(size, "little")

    def _begin(self, token: int, piece: bytes) -> None:
        text = self._text + piece
        seen = text if self._then is not None else text.lstrip()  # a grammar's first byte may be a space
        if piece and seen.startswith(self._open):
            self._state, self._text = "thinking", seen[len(self._open) :]
        elif self._open.startswith(seen) and token not in self._words.ends:
            self._text = text
        else:
            self._state = "over"
            self._follow(token)

    def _think(self, piece: bytes) -> None:
        forced = self._exhausted
        self._spent += 1
        self._text = (self._text + piece)[-len(self._close) - len(piece) :]
        if forced:
            self._forced.pop(0)
        if self._close in self._text or not self._forced:
            self._state = "over"

    def _follow(self, token: int) -> None:
        if self._then is not None:
            self._then.take(token)
