"""One answer as it grows: tokens in, text out, up to its end or a stop string. No I/O."""

from dataclasses import dataclass, replace
from typing import Literal

from server.errors import EngineFailed
from server.text.answer import AnswerReader
from server.text.calls import CallDelta
from server.text.detokenize import Detokenizer
from server.text.stops import StopMatcher
from server.types import FinishReason, TokenLogprobs, Tokens

Finish = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class Scored:
    token: int
    text: str  # what it added to the text: nothing while a character is incomplete
    logprobs: TokenLogprobs | None  # None for the first token of a prompt


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in the answer number `index`."""

    index: int
    text: str
    scored: tuple[Scored, ...] = ()  # tokens of `text`, where logprobs were asked for
    finish: Finish | None = None
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    prompt: tuple[Scored, ...] = ()  # with the first delta, where the prompt is scored
    stop: str | None = None  # the stop string that ended the answer


def understood(delta: Delta, reader: AnswerReader) -> Delta:
    """The delta with thoughts and calls taken out of its text."""
    parts = reader.push(delta.text, last=delta.finish is not None)
    finish: Finish | None = "tool_calls" if delta.finish == "stop" and reader.called else delta.finish
    return replace(delta, text=parts.text, reasoning=parts.reasoning, calls=parts.calls, finish=finish)


class Choice:
    """`push` events until one returns a delta with `finish`: nothing may come after it."""

    def __init__(self, index: int, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self.index = index
        self.tokens = 0  # sampled so far, the one that ended the answer included
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None
        self._held: list[tuple[Scored, int]] = []  # not sent yet, with where each ends in the text
        self._made = self._sent = 0  # characters
        self._stop: str | None = None

    def push(self, event: Tokens) -> Delta:
        """Raises EngineFailed where the engine gave the request up."""
        if event.finish == "abort":
            raise EngineFailed("the engine gave this request up")
        ends = event.finish == "stop" and not event.complete
        shown = event.tokens[:-1] if ends else event.tokens
        if self._stops is None and event.logprobs is None:
            self.tokens += len(event.tokens)
            text = self._detokenizer.push(shown)
            return Delta(
                self.index, text + self._detokenizer.flush() if event.finish else text, (), event.finish
            )
        return self._push_each(event, shown)

    def _push_each(self, event: Tokens, shown: tuple[int, ...]) -> Delta:
        """Token by token, so that the answer ends at the same token however the engine grouped them."""
        text = ""
        for token, scores in zip(shown, event.logprobs or (None,) * len(shown), strict=False):
            self.tokens += 1
            safe, matched = self._take(token, scores)
            text += safe
            if matched:
                return self._delta(text, "stop", cut=True)
        self.tokens += len(event.tokens) - len(shown)
        if event.finish is None:
            return self._delta(text, None)
        rest, matched = self._end()
        return self._delta(text + rest, "stop" if matched else event.finish, cut=matched)

    def _take(self, token: int, scores: TokenLogprobs | None) -> tuple[str, bool]:
        piece = self._detokenizer.push((token,))
        self._made += len(piece)
        if scores is not None:
            self._held.append((Scored(token, piece, scores), self._made))
        return self._match(piece)

    def _end(self) -> tuple[str, bool]:
        """What was held back: an incomplete character belongs to the last token."""
        tail = self._detokenizer.flush()
        self._made += len(tail)
        if self._held and tail:
            last, _ = self._held[-1]
            self._held[-1] = (replace(last, text=last.text + tail), self._made)
        text, matched = self._match(tail)
        if self._stops is not None and not matched:
            text += self._stops.flush()
        return text, matched

    def _match(self, text: str) -> tuple[str, bool]:
        if self._stops is None:
            return text, False
        safe, self._stop = self._stops.push(text)
        return safe, self._stop is not None

    def _delta(self, text: str, finish: FinishReason | None, *, cut: bool = False) -> Delta:
        self._sent += len(text)
        return Delta(self.index, text, self._release(finish, cut), finish, stop=self._stop)

    def _release(self, finish: FinishReason | None, cut: bool) -> tuple[Scored, ...]:
        """Tokens whose text was sent. One that added nothing yet goes with the one that completes it."""
        count = 0
        for number, (scored, end) in enumerate(self._held, 1):
            if cut and end - len(scored.text) >= self._sent:
                break
            if not finish and end > self._sent:
                break
            if finish or scored.text:
                count = number
        released = tuple(scored for scored, _ in self._held[:count])
        del self._held[:count]
        return released
