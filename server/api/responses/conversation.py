"""A request to /v1/responses, after the conversation that it goes on with, as a chat request."""

from collections.abc import Sequence
from typing import Any

from server.api.schema.chat import ChatRequest
from server.api.schema.response_answers import CallOutput, MessageOutput, Output, ReasoningOutput
from server.api.schema.responses import (
    AllowedTools,
    CallItem,
    Content,
    FunctionTool,
    Item,
    MessageItem,
    NamedTool,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
    ResultItem,
)
from server.api.translate import Names, as_chat, shared
from server.errors import RequestError

Fields = dict[str, Any]

NAMES: Names = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def chat_of(body: ResponsesRequest, history: Sequence[Fields]) -> ChatRequest:
    """`history`: messages up to this turn, of `messages_of`. Raises RequestError."""
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    effort = None if body.reasoning is None else body.reasoning.effort
    fields = {
        **shared(body),
        "messages": [*instructions, *history],
        "max_completion_tokens": body.max_output_tokens,
        "stop": body.stop,
        "tools": [_tool(tool) for tool in body.usable],
        "tool_choice": _choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body),
        "reasoning_effort": "xhigh" if effort == "max" else effort,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
    }
    return as_chat(fields, NAMES)


def messages_of(input: str | Sequence[Item]) -> list[Fields]:
    """A turn's messages. What an assistant thought, said and called in a row is one of them."""
    if isinstance(input, str):
        return [{"role": "user", "content": input}]
    turn = Turn()
    for item in input:
        match item:
            case MessageItem(role="assistant"):
                turn.say(_text(item.content))
            case MessageItem():
                turn.add({"role": item.role, "content": _text(item.content)})
            case ReasoningItem():
                turn.think("\n".join(thought.text for thought in item.content or item.summary or ()))
            case CallItem():
                turn.call(item.call_id, item.name, item.arguments)
            case ResultItem():
                turn.add({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return turn.messages


def answered(output: Sequence[Output]) -> list[Fields]:
    """The messages that an answer of ours comes to when the conversation goes on."""
    turn = Turn()
    for item in output:
        match item:
            case ReasoningOutput():
                turn.think("".join(part.text for part in item.content))
            case MessageOutput():
                turn.say("".join(part.text for part in item.content))
            case CallOutput():
                turn.call(item.call_id, item.name, item.arguments)
    return turn.messages


class Turn:
    """Messages as they come together from items."""

    def __init__(self) -> None:
        self.messages: list[Fields] = []
        self._own: Fields | None = None  # the assistant's message that items are added to

    def add(self, message: Fields) -> None:
        self.messages.append(message)
        self._own = None

    def say(self, text: str) -> None:
        own = self._assistant(
            anew=self._own is not None and bool(self._own["content"] or "tool_calls" in self._own)
        )
        own["content"] = text

    def think(self, text: str) -> None:
        self._assistant(anew=True)["reasoning_content"] = text

    def call(self, id: str, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": id, "type": "function", "function": function})

    def _assistant(self, *, anew: bool = False) -> Fields:
        if self._own is None or anew:
            self._own = {"role": "assistant", "content": ""}
            self.messages.append(self._own)
        return self._own


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _tool(tool: FunctionTool) -> Fields:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in fields.items() if value is not None},
    }


def _choice(body: ResponsesRequest) -> object:
    """Raises RequestError."""
    match body.tool_choice:
        case NamedTool(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedTools() as allowed:
            if not {tool.name for tool in allowed.tools} <= {tool.name for tool in body.tools}:
                raise RequestError("tool_choice: there is no such function in tools", param="tool_choice")
            return allowed.mode
        case word:
            return word


def _format(body: ResponsesRequest) -> Fields | None:
    """Raises RequestError."""
    if body.text is None or body.text.format is None:
        return None
    format = body.text.format
    if format.type != "json_schema":
        return {"type": format.type}
    if format.schema_ is None:
        raise RequestError("text.format: type json_schema needs schema", param="text.format")
    return {"type": "json_schema", "json_schema": {"schema": format.schema_}}
