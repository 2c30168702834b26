"""POST /v1/chat/completions."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.api.auth import salt_of
from server.api.body import json_body
from server.api.chunks import ChatChunks, Envelope, Head
from server.api.deps import Using
from server.api.door import answer_stream, answer_whole, fingerprint, new_id, now
from server.api.generate import Answer, Begun, Plan, Prompt, Whole, sampling_params
from server.api.logprobs import chat_logprobs
from server.api.schema.answers import AnswerMessage, ChatChoice, ChatCompletion
from server.api.schema.chat import ChatRequest
from server.pool.states import Lease

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions")
async def chat(
    request: Request,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
    services: Using,
) -> Response:
    id, created = new_id("chatcmpl"), now()
    plan = partial(_plan, body, id, salt_of(request))
    if body.stream:
        return await answer_stream(request, services, body, plan, partial(_chunks, body, id, created))
    return await answer_whole(request, services, body, plan, partial(_completion, body, id, created))


async def _plan(body: ChatRequest, id: str, salt: str, lease: Lease) -> Plan:
    """Tools are not shown to the model: it may not call them (`tool_choice` is "none")."""
    text = lease.text
    prompt = await text.encode_chat([message.fields for message in body.messages])
    return Plan(
        id=id,
        prompts=(Prompt(tokens=tuple(prompt)),),
        params=sampling_params(body, text.sampling, max_tokens=body.answer_limit, logprobs=body.scored),
        candidates=body.n,
        stops=(*body.stop, *text.default_stops),
        priority=body.priority,
        salt=salt,
        prompt_field="messages",
    )


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
    begun = whole.begun
    return ChatCompletion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(begun.served),
        choices=[_choice(body, begun, index, answer) for index, answer in enumerate(whole.answers)],
        usage=whole.tally.usage,
    )


def _choice(body: ChatRequest, begun: Begun, index: int, answer: Answer) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AnswerMessage(content=answer.text),
        logprobs=chat_logprobs(answer.scored, begun.vocabulary) if body.logprobs else None,
        finish_reason=answer.finish,
    )
