"""/tokenize and /detokenize: a model's own view of a text. They load the model like any request."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import Struct

from server.api.body import json_body
from server.api.deps import Services, Using, announce
from server.api.generate import check_tokens
from server.api.leaving import unless_gone
from server.api.schema.tokens import DetokenizeRequest, TokenizeRequest
from server.text.detokenize import detokenize

router = APIRouter(tags=["tokens"])


class Tokenized(Struct, frozen=True, kw_only=True):
    tokens: list[int]
    count: int


class Detokenized(Struct, frozen=True, kw_only=True):
    content: str


@router.post("/tokenize")
async def tokenize(
    request: Request,
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    return _json(await unless_gone(request.receive, _tokenized(body, services)))


@router.post("/detokenize")
async def detokenize_route(
    request: Request,
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    return _json(await unless_gone(request.receive, _detokenized(body, services)))


async def _tokenized(body: TokenizeRequest, services: Services) -> Tokenized:
    async with services.pool.acquire(body.model, wait_s=services.settings.build_wait_s) as lease:
        tokens = await lease.text.encode(body.content, add_special=body.add_special, parse_special=True)
    return Tokenized(tokens=list(tokens), count=len(tokens))


async def _detokenized(body: DetokenizeRequest, services: Services) -> Detokenized:
    """Control tokens are shown by their text, so that it is the inverse of /tokenize."""
    async with services.pool.acquire(body.model, wait_s=services.settings.build_wait_s) as lease:
        check_tokens(body.tokens, lease.text, "tokens")
        return Detokenized(content=detokenize(lease.text.vocabulary, body.tokens, show_control=True))


def _json(value: Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
