"""A response as OpenAI's typed events, each with its number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from server.api.choice import Delta, Finish, Scored
from server.api.door import new_id
from server.api.generate import Begun, Part, Tally
from server.api.responses.answer import ended, is_cut, logprobs
from server.api.schema.answers import TokenLogprob
from server.api.schema.response_answers import (
    CallOutput,
    MessageOutput,
    ModelResponse,
    Output,
    OutputText,
    ReasoningOutput,
    ReasoningText,
    ResponseFailure,
)
from server.api.sse import PING, event
from server.errors import RateLimited, ServerError
from server.text.calls import CallDelta
from server.text.vocabulary import Vocabulary


@dataclass(slots=True)
class Writing:
    """The item that is being written, as it was announced, and what came of its text."""

    item: Output
    text: str = ""
    scored: list[TokenLogprob] = field(default_factory=list)

    def done(self, status: str) -> Output:
        match self.item:
            case CallOutput():
                return replace(self.item, arguments=self.text, status=status)
            case MessageOutput():
                return replace(self.item, content=[self.part()], status=status)
            case ReasoningOutput():
                return replace(self.item, content=[self.part()], status=status)

    def part(self) -> OutputText | ReasoningText:
        if isinstance(self.item, ReasoningOutput):
            return ReasoningText(text=self.text)
        return OutputText(text=self.text, logprobs=self.scored)


# What the events of an item's text are called.
TEXTS: Mapping[type[Output], str] = {
    ReasoningOutput: "response.reasoning_text",
    MessageOutput: "response.output_text",
    CallOutput: "response.function_call_arguments",
}


class ResponseEvents:
    """Events of one response; also what its stream says in between and when it breaks off."""

    ping = PING
    end = b""

    def __init__(self, response: ModelResponse, keep: Callable[[ModelResponse], None]) -> None:
        """`keep` gets the response once it is complete."""
        self._response, self._keep = response, keep
        self._number = 0
        self._started = False
        self._output: list[Output] = []
        self._writing: Writing | None = None
        self._finish: Finish | None = None

    def begin(self, begun: Begun) -> "ResponseEvents":
        self._vocabulary: Vocabulary = begun.vocabulary
        return self

    def frames(self, part: Part) -> bytes:
        match part:
            case Begun():
                return b""
            case Delta():
                return self._start() + self._delta(part)
            case Tally():
                return self._end(part)

    def error(self, error: ServerError) -> bytes:
        code = "rate_limit_exceeded" if isinstance(error, RateLimited) else "server_error"
        failure = ResponseFailure(code=code, message=str(error))
        failed = replace(self._response, status="failed", error=failure, output=self._output)
        return self._start() + self._event("response.failed", response=failed)

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def _delta(self, delta: Delta) -> bytes:
        out = b""
        if delta.reasoning:
            out += self._think() + self._grow(delta.reasoning)
        if delta.text or delta.scored:
            out += self._say() + self._grow(delta.text, delta.scored)
        for call in delta.calls:
            out += self._call(call)
        self._finish = delta.finish
        return out

    def _think(self) -> bytes:
        if self._writing is not None and isinstance(self._writing.item, ReasoningOutput):
            return b""
        return self._open(ReasoningOutput(id=new_id("rs_"), content=[], status="in_progress"))

    def _say(self) -> bytes:
        if self._writing is not None and isinstance(self._writing.item, MessageOutput):
            return b""
        return self._open(MessageOutput(id=new_id("msg_"), content=[], status="in_progress"))

    def _call(self, call: CallDelta) -> bytes:
        out = b""
        if call.name is not None:
            item = CallOutput(
                id=new_id("fc_"), call_id=call.id or "", name=call.name, arguments="", status="in_progress"
            )
            out = self._open(item)
        return out + self._grow(call.arguments) if call.arguments else out

    def _open(self, item: Output) -> bytes:
        out = self._close()
        self._writing = Writing(item)
        out += self._event("response.output_item.added", output_index=len(self._output), item=item)
        if isinstance(item, CallOutput):
            return out
        return out + self._of_part("response.content_part.added", part=self._writing.part())

    def _grow(self, text: str, scored: tuple[Scored, ...] = ()) -> bytes:
        writing = self._now
        writing.text += text
        name = TEXTS[type(writing.item)] + ".delta"
        if isinstance(writing.item, CallOutput):
            return self._of_item(name, delta=text)
        if isinstance(writing.item, ReasoningOutput):
            return self._of_part(name, delta=text)
        new = logprobs(scored, self._vocabulary)
        writing.scored += new
        return self._of_part(name, delta=text, logprobs=new)

    def _close(self, status: str = "completed") -> bytes:
        if self._writing is None:
            return b""
        writing, item = self._writing, self._writing.done(status)
        name = TEXTS[type(item)] + ".done"
        match item:
            case CallOutput():
                out = self._of_item(name, name=item.name, arguments=item.arguments)
            case ReasoningOutput():
                out = self._of_part(name, text=writing.text)
            case MessageOutput():
                out = self._of_part(name, text=writing.text, logprobs=writing.scored)
        if not isinstance(item, CallOutput):
            out += self._of_part("response.content_part.done", part=writing.part())
        out += self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._writing = None
        return out

    def _end(self, tally: Tally) -> bytes:
        out = b""
        if not self._output and (self._writing is None or isinstance(self._writing.item, ReasoningOutput)):
            out = self._say()  # nothing, but said
        cut = self._writing is not None and is_cut(self._writing.item, self._finish)
        out += self._close("incomplete" if cut else "completed")
        response = ended(self._response, self._output, self._finish, tally)
        self._keep(response)
        return out + self._event(f"response.{response.status}", response=response)

    @property
    def _now(self) -> Writing:
        assert self._writing is not None, "text belongs to an item"
        return self._writing

    def _of_item(self, kind: str, **fields: object) -> bytes:
        return self._event(kind, item_id=self._now.item.id, output_index=len(self._output), **fields)

    def _of_part(self, kind: str, **fields: object) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> bytes:
        number = self._number
        self._number += 1
        return event(kind, msgspec.json.encode({"type": kind, "sequence_number": number, **fields}))
