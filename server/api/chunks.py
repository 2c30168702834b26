"""Chunks of a stream. All that stays the same from chunk to chunk is encoded once."""

from typing import Protocol

import msgspec
from msgspec import Struct

from server.api.choice import Delta, Scored
from server.api.generate import Begun, Part, Tally
from server.api.logprobs import chat_logprobs, completion_logprobs
from server.api.sse import frame, safe_lines
from server.text.calls import CallDelta
from server.text.vocabulary import Vocabulary

_json = msgspec.json.encode


class Head(Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Chunks(Protocol):
    def frames(self, part: Part) -> bytes:
        """Any number of whole frames; empty where there is nothing to say."""
        ...


class Envelope:
    """`{head, "choices":[CHOICE], "usage":null}`, with usage only where it was asked for."""

    def __init__(self, head: Head, *, wants_usage: bool) -> None:
        self._start = _json(head)[:-1] + b',"choices":['
        self._end = b'],"usage":null}' if wants_usage else b"]}"
        self._wants_usage = wants_usage

    def choice(self, choice: bytes) -> bytes:
        return frame(self._start + choice + self._end)

    def usage(self, tally: Tally) -> bytes:
        if not self._wants_usage:
            return b""
        return frame(self._start + b'],"usage":' + _json(tally.usage) + b"}")


class ChatChunks:
    def __init__(self, envelope: Envelope, vocabulary: Vocabulary) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._begun: set[int] = set()

    def frames(self, part: Part) -> bytes:
        match part:
            case Delta():
                return self._delta(part)
            case Tally():
                return self._envelope.usage(part)
            case Begun():
                return b""

    def _delta(self, delta: Delta) -> bytes:
        """The role first, text where there is some, the finish last."""
        out = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            out = self._choice(delta.index, b'{"role":"assistant","content":"","refusal":null}')
        if delta.reasoning:
            thoughts = b'{"reasoning_content":' + safe_lines(_json(delta.reasoning)) + b"}"
            out += self._choice(delta.index, thoughts)
        if delta.text or delta.scored:
            content = b'{"content":' + safe_lines(_json(delta.text)) + b"}"
            out += self._choice(delta.index, content, self._logprobs(delta.scored))
        for call in delta.calls:
            calls = b'{"tool_calls":[' + safe_lines(_json(_call(call))) + b"]}"
            out += self._choice(delta.index, calls)
        if delta.finish:
            out += self._choice(delta.index, b"{}", finish=_json(delta.finish))
        return out

    def _choice(self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        return self._envelope.choice(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)
        )

    def _logprobs(self, scored: tuple[Scored, ...]) -> bytes:
        return safe_lines(_json(chat_logprobs(scored, self._vocabulary))) if scored else b"null"


def _call(delta: CallDelta) -> dict[str, object]:
    """Its id and name come once, with the first of its arguments."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


class CompletionChunks:
    def __init__(self, envelope: Envelope, vocabulary: Vocabulary) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._lengths: dict[int, int] = {}

    def frames(self, part: Part) -> bytes:
        match part:
            case Delta():
                return self._delta(part)
            case Tally():
                return self._envelope.usage(part)
            case Begun():
                return b""

    def _delta(self, delta: Delta) -> bytes:
        if not (delta.text or delta.scored or delta.prompt or delta.finish):
            return b""
        return self._envelope.choice(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (delta.index, safe_lines(_json(delta.text)), self._logprobs(delta), _json(delta.finish))
        )

    def _logprobs(self, delta: Delta) -> bytes:
        """`text_offset` counts from the start of the whole answer."""
        scored = delta.prompt + delta.scored
        if not scored:
            return b"null"
        start = self._lengths.get(delta.index, 0)
        self._lengths[delta.index] = start + sum(len(one.text) for one in scored)
        return safe_lines(_json(completion_logprobs(scored, self._vocabulary, start=start)))
