"""A request to /v1/messages as a chat request."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.api.schema.chat import ChatRequest
from server.api.schema.messages import (
    ClientTool,
    Conversing,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    TurnMessage,
    WantedTool,
)
from server.api.translate import Names, as_chat, shared
from server.errors import RequestError
from server.text.schemas import dump

Fields = dict[str, Any]

CHOICES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}
NAMES: Names = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "reasoning_budget": "thinking",
    "continue_final_message": "messages",
    "parallel_tool_calls": "tool_choice",
}


def chat_of(body: MessagesRequest | CountTokensRequest) -> ChatRequest:
    """Raises RequestError."""
    config = body.output_config
    schema = None if config is None or config.format is None else config.format.schema_
    fields = {
        **shared(body),
        "messages": [*_system(body.system), *(part for message in body.messages for part in _parts(message))],
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "tools": [_tool(tool) for tool in body.tools],
        "continue_final_message": body.messages[-1].role == "assistant",
        "response_format": schema and {"type": "json_schema", "json_schema": {"schema": schema}},
        **_choice(body.tool_choice),
        **_thoughts(body),
    }
    return as_chat(fields, NAMES)


def _system(system: str | Sequence[TextBlock]) -> Iterator[Fields]:
    if system:
        yield {"role": "system", "content": _text(system)}


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _parts(message: TurnMessage) -> Iterator[Fields]:
    """Results of functions are messages of their own there, in the order of the blocks."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    if message.role == "assistant":
        yield _said(message)
        return
    texts: list[str] = []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock() if message.role == "user":
                yield from _joined(message.role, texts)
                yield _result(block)
            case _:
                raise RequestError(
                    f"messages: {block.type} is not possible in a message of role {message.role}",
                    param="messages",
                )
    yield from _joined(message.role, texts)


def _joined(role: str, texts: list[str]) -> Iterator[Fields]:
    if texts:
        yield {"role": role, "content": "\n".join(texts)}
        texts.clear()


def _result(block: ToolResultBlock) -> Fields:
    text = _text(block.content)
    content = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _said(message: TurnMessage) -> Fields:
    """One message, whatever it is made of."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Fields] = []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": dump(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise RequestError(
                    "messages: tool_result is not possible in a message of role assistant", param="messages"
                )
    said: Fields = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    return {**said, "tool_calls": calls} if calls else said


def _tool(tool: ClientTool) -> Fields:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    function = {key: value for key, value in fields.items() if value is not None}
    return {"type": "function", "function": function}


def _choice(choice: WantedTool | None) -> Fields:
    """Raises RequestError."""
    if choice is None:
        return {}
    if choice.type != "tool":
        wanted: object = CHOICES[choice.type]
    elif choice.name is None:
        raise RequestError("tool_choice: type tool needs a name", param="tool_choice")
    else:
        wanted = {"type": "function", "function": {"name": choice.name}}
    return {"tool_choice": wanted, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _thoughts(body: Conversing) -> Fields:
    """Raises RequestError."""
    effort = None if body.output_config is None else body.output_config.effort
    fields: Fields = {"reasoning_effort": "xhigh" if effort == "max" else effort}
    if body.thinking is None or body.thinking.type == "adaptive":
        return fields
    if body.thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    if body.thinking.budget_tokens is None:
        raise RequestError("thinking: type enabled needs budget_tokens", param="thinking")
    return {**fields, "reasoning_budget": body.thinking.budget_tokens}
