"""What of a chat request its model's chat template does not read, named like other fields without effect."""

import asyncio
from collections.abc import Iterator

from fastapi import Request

from server.api.conversation import render, rendering_of
from server.api.ignored import name_ignored
from server.api.schema.chat import ChatRequest, Message
from server.errors import RequestError
from server.text.model import TextModel

OPTIONAL = ("name", "reasoning_content", "refusal", "tool_call_id")  # of a message; few templates read them


async def name_unused(request: Request, body: ChatRequest, text: TextModel) -> None:
    """Puts it into X-Ignored-Params, which a stream sends with its first byte: in time, but for a ping.

    Call it once the prompt is known to fit: it may be rendered again.
    """
    known = text.template.variables
    unused = [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs if name not in known]
    if any(True for _ in _optional(body)):
        unused += await asyncio.to_thread(unread, body, text)
    name_ignored(request, unused)


def unread(body: ChatRequest, text: TextModel) -> list[str]:
    """Fields of messages without which the prompt is the same. Takes seconds at most: call it in a thread."""
    told = render(body, text)
    return [f"messages.{name}" for role, name in _optional(body) if _without(role, name, body, text) == told]


def _optional(body: ChatRequest) -> Iterator[tuple[str, str]]:
    """Roles and their fields, each pair once. A result's `tool_call_id` is no wish: it has to be there."""
    pairs = dict.fromkeys(
        (message.role, name) for message in body.messages for name in OPTIONAL if _has(message, name)
    )
    return (pair for pair in pairs if pair != ("tool", "tool_call_id"))


def _has(message: Message, name: str) -> bool:
    """A refusal without content is the content."""
    return getattr(message, name) is not None and (name != "refusal" or message.content is not None)


def _without(role: str, name: str, body: ChatRequest, text: TextModel) -> str | None:
    """The prompt without this field of this role's messages; None where the template refuses them."""
    try:
        return rendering_of([_bare(message, role, name) for message in body.messages], body, text)
    except RequestError:
        return None


def _bare(message: Message, role: str, name: str) -> dict[str, object]:
    return {key: value for key, value in message.fields.items() if message.role != role or key != name}
