"""/v1/responses: OpenAI's newer API over the same road as chat. What is stored lives in memory only."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from server.api.auth import salt_of
from server.api.body import json_body
from server.api.deps import Services, Using
from server.api.door import answer_stream, answer_whole, new_id
from server.api.responses.answer import begun, whole_response
from server.api.responses.conversation import NAMES, answered, chat_of, messages_of
from server.api.responses.events import ResponseEvents
from server.api.responses.store import Stored
from server.api.schema.response_answers import Deleted, ModelResponse
from server.api.schema.responses import ResponsesRequest
from server.api.translate import planner
from server.api.whole import Whole
from server.errors import PreviousResponseNotFound, RequestError, UnknownResponse, UnsupportedParameter

router = APIRouter(tags=["inference"])

Fields = dict[str, Any]
Keep = Callable[[ModelResponse], None]


@router.post("/v1/responses")
async def create_response(
    request: Request,
    body: Annotated[ResponsesRequest, Depends(json_body(ResponsesRequest))],
    services: Using,
) -> Response:
    id, salt = new_id("resp_"), salt_of(request)
    messages = [*_before(body, services, salt), *messages_of(body.input)]
    chat = chat_of(body, messages)
    plan = planner(chat, id, salt, NAMES)
    keep = partial(_keep, services, salt, messages) if body.store else _forget
    response = begun(body, id)
    if body.stream:
        events = ResponseEvents(response, keep)
        return await answer_stream(request, services, chat, plan, events.begin, events)
    return await answer_whole(request, services, chat, plan, partial(_kept, response, keep))


@router.get("/v1/responses/{id}")
async def retrieve_response(id: str, request: Request, services: Using) -> Response:
    if request.query_params.get("stream", "false") != "false":
        raise UnsupportedParameter("stream: a stored response comes whole", param="stream")
    return _json(services.responses.get(salt_of(request), id).response)


@router.delete("/v1/responses/{id}")
async def delete_response(id: str, request: Request, services: Using) -> Response:
    services.responses.delete(salt_of(request), id)
    return _json(Deleted(id=id))


@router.post("/v1/responses/{id}/cancel")
async def cancel_response(id: str, request: Request, services: Using) -> Response:
    """Only what runs in the background could be cancelled, and nothing does: a client leaves its request."""
    services.responses.get(salt_of(request), id)
    raise RequestError(
        "background: only a response that runs in the background can be cancelled", param="background"
    )


def _before(body: ResponsesRequest, services: Services, salt: str) -> list[Fields]:
    """Raises PreviousResponseNotFound."""
    if body.previous_response_id is None:
        return []
    try:
        return services.responses.get(salt, body.previous_response_id).messages
    except UnknownResponse as error:
        raise PreviousResponseNotFound(
            f"previous_response_id: {error}", param="previous_response_id"
        ) from None


def _keep(services: Services, salt: str, messages: list[Fields], response: ModelResponse) -> None:
    services.responses.put(salt, Stored(response, [*messages, *answered(response.output)]))


def _forget(response: ModelResponse) -> None:
    pass


def _kept(response: ModelResponse, keep: Keep, whole: Whole) -> ModelResponse:
    complete = whole_response(response, whole)
    keep(complete)
    return complete


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
