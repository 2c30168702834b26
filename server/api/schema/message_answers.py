"""What /v1/messages answers: encoded as it stands here, fields in this order."""

from typing import Any

from msgspec import Struct


class Text(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class Thought(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUse(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int  # but for those that were found in the prefix cache
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AssistantTurn(Struct, frozen=True, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[Text | Thought | ToolUse]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Struct, frozen=True, kw_only=True):
    input_tokens: int
