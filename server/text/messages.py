"""A client's messages as chat templates expect them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import RequestError

MAX_DEPTH = 64
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same thing, the usual one first


@dataclass(frozen=True)
class Traits:
    """What a template can take, found out by trying it."""

    parts: bool = False  # content must be a list of parts
    text_arguments: bool = False  # arguments of tool calls must be JSON text, not an object
    developer: bool = False  # knows this role
    tools: bool = False  # reads `tools`
    calls: bool = False  # shows calls that were made
    system: bool = True  # shows system messages


def prepare(messages: Sequence[Mapping[str, object]], traits: Traits) -> list[dict[str, Any]]:
    """Copies with content as one string. Raises RequestError naming the field."""
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    return [prepare_one(message, f"messages[{i}]", traits) for i, message in enumerate(messages)]


def prepare_one(message: Mapping[str, object], where: str, traits: Traits) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role", param=where)
    # Templates test whether a key is there, and print None as "None".
    fields = {str(key): plain(value, where) for key, value in message.items() if value is not None}
    if fields["role"] == "developer" and not traits.developer:
        fields["role"] = "system"
    fields["content"] = flatten(fields.get("content"), f"{where}.content")
    if "tool_calls" in fields:
        fields["tool_calls"] = tool_calls(fields["tool_calls"], f"{where}.tool_calls", traits)
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy out of JSON's types only: a template must not meet an object with methods of its own."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested too deeply", param=where)
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a value that is no JSON", param=where)


def flatten(content: object, where: str) -> str:
    """Text of a content; parts of a list are paragraphs of their own, as other servers do it."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return "\n".join(part_text(part, f"{where}[{i}]") for i, part in enumerate(content))
    raise RequestError(f"{where} must be a string or a list of parts", param=where)


def part_text(part: object, where: str) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": "text" | "refusal"}:
            raise RequestError(f"{where} has no text", param=where)
    raise RequestError(f"{where}: only parts of type text are supported", param=where)


def tool_calls(calls: object, where: str, traits: Traits) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where} must be a list of objects", param=where)
    return [
        {**call, "function": called(call["function"], traits)} if "function" in call else call
        for call in calls
    ]


def called(function: object, traits: Traits) -> object:
    if not isinstance(function, dict) or "arguments" not in function:
        return function
    arguments = function["arguments"]
    if traits.text_arguments:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": text}
    return {**function, "arguments": parsed(arguments)}


def parsed(arguments: object) -> object:
    """OpenAI sends arguments as JSON text, templates print objects. What is no JSON object stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
