"""/tokenize, /detokenize, /apply-template: a model's own view of a text. They load it like any request."""

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import Struct

from server.api.body import json_body
from server.api.conversation import render
from server.api.deps import Services, Using, announce, correct
from server.api.generate import check_tokens
from server.api.leaving import unless_gone
from server.api.schema.chat import ChatRequest
from server.api.schema.tokens import DetokenizeRequest, TokenizeRequest
from server.api.unused import name_unused
from server.text.detokenize import detokenize

router = APIRouter(tags=["tokens"])


class Tokenized(Struct, frozen=True, kw_only=True):
    tokens: list[int]
    count: int


class Detokenized(Struct, frozen=True, kw_only=True):
    content: str


class AppliedTemplate(Struct, frozen=True, kw_only=True):
    prompt: str
    tokens: list[int]
    count: int


@router.post("/tokenize")
async def tokenize(
    request: Request,
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    return _json(await unless_gone(request.receive, _tokenized(request, body, services)))


@router.post("/detokenize")
async def detokenize_route(
    request: Request,
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    return _json(await unless_gone(request.receive, _detokenized(request, body, services)))


@router.post("/apply-template")
async def apply_template(
    request: Request,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    return _json(await unless_gone(request.receive, _applied(request, body, services)))


async def _applied(request: Request, body: ChatRequest, services: Services) -> AppliedTemplate:
    """What the model would be told by a chat request with this body."""
    async with services.pool.acquire(body.model, wait_s=services.settings.build_wait_s) as lease:
        correct(request, lease.variant)
        prompt = await asyncio.to_thread(render, body, lease.text)
        tokens = await lease.text.encode_rendered(prompt)
        await name_unused(request, body, lease.text)
    return AppliedTemplate(prompt=prompt, tokens=list(tokens), count=len(tokens))


async def _tokenized(request: Request, body: TokenizeRequest, services: Services) -> Tokenized:
    async with services.pool.acquire(body.model, wait_s=services.settings.build_wait_s) as lease:
        correct(request, lease.variant)
        tokens = await lease.text.encode(body.content, add_special=body.add_special, parse_special=True)
    return Tokenized(tokens=list(tokens), count=len(tokens))


async def _detokenized(request: Request, body: DetokenizeRequest, services: Services) -> Detokenized:
    """Control tokens are shown by their text, so that it is the inverse of /tokenize."""
    async with services.pool.acquire(body.model, wait_s=services.settings.build_wait_s) as lease:
        correct(request, lease.variant)
        check_tokens(body.tokens, lease.text, "tokens")
        return Detokenized(content=detokenize(lease.text.vocabulary, body.tokens, show_control=True))


def _json(value: Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
