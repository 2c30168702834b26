"""What /v1/messages answers: the message, and its form as events."""

from typing import Any

import msgspec

from server.api.choice import Delta, Finish
from server.api.envelope import messages_error
from server.api.generate import Begun, Part, Tally
from server.api.schema.message_answers import AssistantTurn, MessageUsage, Text, Thought, ToolUse
from server.api.sse import event
from server.api.whole import Answer, Call, Whole
from server.errors import ServerError
from server.text.calls import CallDelta


def usage(prompt: int, cached: int, completion: int) -> MessageUsage:
    return MessageUsage(
        input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=completion
    )


def stop_reason(finish: Finish | None, stop: str | None) -> str:
    match finish:
        case "length":
            return "max_tokens"
        case "tool_calls":
            return "tool_use"
        case _:
            return "end_turn" if stop is None else "stop_sequence"


def turn(id: str, model: str, asked: list[str], whole: Whole) -> AssistantTurn:
    """`asked`: the request's stop_sequences; a model may have others of its own."""
    (answer,), tally = whole.answers, whole.tally
    stop = answer.stop if answer.stop in asked else None
    return AssistantTurn(
        id=id,
        model=model,
        content=_content(answer),
        stop_reason=stop_reason(answer.finish, stop),
        stop_sequence=stop,
        usage=usage(tally.prompt, tally.cached, tally.completion),
    )


def _content(answer: Answer) -> list[Text | Thought | ToolUse]:
    content: list[Text | Thought | ToolUse] = []
    if answer.reasoning:
        content.append(Thought(thinking=answer.reasoning))
    if answer.text or not answer.calls:
        content.append(Text(text=answer.text))
    return [*content, *map(_tool_use, answer.calls)]


def _tool_use(call: Call) -> ToolUse:
    """Arguments that `max_tokens` cut off are no object yet: what there is of them is in the stream only."""
    try:
        arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        arguments = {}
    return ToolUse(id=call.id, name=call.name, input=arguments)


class MessageEvents:
    """Events of one message; also what its stream says in between and when it breaks off."""

    ping = event("ping", b'{"type":"ping"}')
    end = b""

    def __init__(self, id: str, model: str, asked: list[str]) -> None:
        self._id, self._model, self._asked = id, model, asked
        self._start = b""
        self._open: str | None = None  # kind of the block that is being written
        self._blocks = 0
        self._said = False
        self._finish: Finish | None = None
        self._stop: str | None = None

    def begin(self, begun: Begun) -> "MessageEvents":
        nothing = AssistantTurn(
            id=self._id,
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=usage(begun.prompt, begun.cached, 0),
        )
        self._start = _event("message_start", message=nothing)
        return self

    def frames(self, part: Part) -> bytes:
        match part:
            case Begun():
                return b""
            case Delta():
                start, self._start = self._start, b""
                return start + self._delta(part)
            case Tally():
                return self._close_all(part)

    def error(self, error: ServerError) -> bytes:
        return event("error", msgspec.json.encode(messages_error(error)))

    def _delta(self, delta: Delta) -> bytes:
        out = b""
        if delta.reasoning:
            out += self._within("thinking", Thought(thinking=""))
            out += self._grow({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.text:
            out += self._within("text", Text(text=""))
            out += self._grow({"type": "text_delta", "text": delta.text})
        for call in delta.calls:
            out += self._call(call)
        if delta.finish:
            self._finish = delta.finish
            self._stop = delta.stop if delta.stop in self._asked else None
        return out

    def _call(self, call: CallDelta) -> bytes:
        out = b""
        if call.name is not None:
            out = self._close() + self._within(
                "tool_use", ToolUse(id=call.id or "", name=call.name, input={})
            )
        if call.arguments:
            out += self._grow({"type": "input_json_delta", "partial_json": call.arguments})
        return out

    def _within(self, kind: str, block: Text | Thought | ToolUse) -> bytes:
        """A block of that kind is open then."""
        if self._open == kind:
            return b""
        out = self._close()
        self._open = kind
        self._said = self._said or kind != "thinking"
        return out + _event("content_block_start", index=self._blocks, content_block=block)

    def _grow(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = self._grow({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        out = signed + _event("content_block_stop", index=self._blocks)
        self._open = None
        self._blocks += 1
        return out

    def _close_all(self, tally: Tally) -> bytes:
        out = b"" if self._said else self._within("text", Text(text=""))
        delta = {"stop_reason": stop_reason(self._finish, self._stop), "stop_sequence": self._stop}
        spent = usage(tally.prompt, tally.cached, tally.completion)
        return (
            out + self._close() + _event("message_delta", delta=delta, usage=spent) + _event("message_stop")
        )


def _event(kind: str, **fields: object) -> bytes:
    return event(kind, msgspec.json.encode({"type": kind, **fields}))
