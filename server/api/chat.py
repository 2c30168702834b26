"""POST /v1/chat/completions."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET

from server.api.auth import salt_of
from server.api.body import json_body
from server.api.chunks import ChatChunks, Envelope, Head
from server.api.conversation import plan_chat
from server.api.deps import Using
from server.api.door import answer_stream, answer_whole, fingerprint, new_id, now
from server.api.generate import Begun, Plan
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.schema.answers import AnswerCall, AnswerMessage, CalledFunction, ChatChoice, ChatCompletion
from server.api.schema.chat import ChatRequest
from server.api.unused import name_unused
from server.api.whole import Answer, Whole
from server.pool.states import Lease
from server.types import Grammar

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions")
async def chat(
    request: Request,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
    services: Using,
) -> Response:
    id, created = new_id("chatcmpl-"), now()
    grammar = body.grammar(allows_lark=services.settings.lark_grammars)
    plan = partial(_planned, request, body, id, grammar)
    if body.stream:
        return await answer_stream(request, services, body, plan, partial(_chunks, body, id, created))
    return await answer_whole(request, services, body, plan, partial(_completion, body, id, created))


async def _planned(
    request: Request, body: ChatRequest, id: str, grammar: Grammar | None, lease: Lease
) -> Plan:
    plan = await plan_chat(body, id, salt_of(request), grammar, lease)
    await name_unused(request, body, lease.text)
    return plan


def _chunks(body: ChatRequest, id: str, created: int, begun: Begun) -> ChatChunks:
    head = Head(
        id=id,
        object="chat.completion.chunk",
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(begun.served),
    )
    return ChatChunks(Envelope(head, wants_usage=body.wants_usage), begun.vocabulary)


def _completion(body: ChatRequest, id: str, created: int, whole: Whole) -> ChatCompletion:
    begun, prompt, asked = whole.begun, whole.answers[0].prompt, body.prompt_logprobs
    return ChatCompletion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(begun.served),
        choices=[_choice(body, begun, index, answer) for index, answer in enumerate(whole.answers)],
        usage=whole.tally.usage,
        prompt_logprobs=UNSET if asked is None else prompt_logprobs(prompt, begun.vocabulary, asked),
    )


def _choice(body: ChatRequest, begun: Begun, index: int, answer: Answer) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=_message(answer),
        logprobs=chat_logprobs(answer.scored, begun.vocabulary) if body.logprobs else None,
        finish_reason=answer.finish,
    )


def _message(answer: Answer) -> AnswerMessage:
    calls = [
        AnswerCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in answer.calls
    ]
    return AnswerMessage(
        content=answer.text or None if calls else answer.text,
        reasoning_content=answer.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )
