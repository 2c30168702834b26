"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same road as chat."""

from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from server.api.auth import salt_of
from server.api.body import json_body
from server.api.deps import Services, Using, announce, correct
from server.api.door import answer_stream, answer_whole, new_id
from server.api.generate import Planner
from server.api.leaving import unless_gone
from server.api.messages.answer import MessageEvents, turn
from server.api.messages.conversation import NAMES, chat_of
from server.api.schema.message_answers import TokenCount
from server.api.schema.messages import CountTokensRequest, MessagesRequest
from server.api.translate import planner

router = APIRouter(tags=["inference"])


@router.post("/v1/messages")
async def messages(
    request: Request,
    body: Annotated[MessagesRequest, Depends(json_body(MessagesRequest))],
    services: Using,
) -> Response:
    id, chat = new_id("msg_"), chat_of(body)
    plan = planner(chat, id, salt_of(request), NAMES)
    if body.stream:
        events = MessageEvents(id, body.model, body.stop_sequences)
        return await answer_stream(request, services, chat, plan, events.begin, events)
    return await answer_whole(
        request, services, chat, plan, partial(turn, id, body.model, body.stop_sequences)
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    request: Request,
    body: Annotated[CountTokensRequest, Depends(json_body(CountTokensRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    plan = planner(chat_of(body), "", "", NAMES)
    count = await unless_gone(request.receive, _counted(request, services, body.model, plan))
    return Response(msgspec.json.encode(count), media_type="application/json")


async def _counted(request: Request, services: Services, model: str, plan: Planner) -> TokenCount:
    async with services.pool.acquire(model, wait_s=services.settings.build_wait_s) as lease:
        correct(request, lease.variant)
        (prompt,) = (await plan(lease)).prompts
    return TokenCount(input_tokens=len(prompt.tokens))
