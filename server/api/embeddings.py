"""POST /v1/embeddings: texts or token ids in, vectors of length 1 out."""

import array
import asyncio
import base64
import math
import sys
from collections.abc import Sequence
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from server.api.body import json_body
from server.api.deps import Services, Using, announce, correct
from server.api.generate import check_tokens, refuse_when_full
from server.api.leaving import unless_gone
from server.api.room import require_room
from server.api.schema.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from server.api.share import Share
from server.errors import ContextTooLong, RequestError, UnsupportedParameter
from server.pool.states import Lease
from server.pool.uses import Use

VECTORS: frozenset[Use] = frozenset(("vectors",))

router = APIRouter(tags=["inference"])


@router.post("/v1/embeddings")
async def embeddings(
    request: Request,
    body: Annotated[EmbeddingRequest, Depends(json_body(EmbeddingRequest))],
    services: Using,
) -> Response:
    announce(request, services, body.model)
    answer = await unless_gone(request.receive, _embedded(request, body, services))
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _embedded(request: Request, body: EmbeddingRequest, services: Services) -> EmbeddingList:
    wait_s = services.settings.build_wait_s
    async with services.pool.acquire(body.model, wait_s=wait_s, uses=VECTORS) as lease:
        correct(request, lease.variant)
        width = _width(body, lease)
        refuse_when_full(lease, services.settings.queue_limit)
        texts = [await _tokens(item, lease) for item in body.input]
        refuse_when_full(lease, services.settings.queue_limit)  # others came meanwhile
        vectors = await _vectors(lease, texts)
    count = sum(map(len, texts))
    return EmbeddingList(
        data=[
            Embedding(index=index, embedding=_shaped(vector, width, body.encoding_format == "base64"))
            for index, vector in enumerate(vectors)
        ],
        model=body.model,
        usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count),
    )


async def _vectors(lease: Lease, texts: Sequence[Sequence[int]]) -> list[bytes]:
    """The first error takes the other texts from the engine's queue. Raises ServerErrors."""
    share = Share(lease)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_vector(lease, tokens, share)) for tokens in texts]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _vector(lease: Lease, tokens: Sequence[int], share: Share) -> bytes:
    await share.enter()
    vector = await lease.engine.embed(tokens)
    share.leave()
    return vector


def _width(body: EmbeddingRequest, lease: Lease) -> int:
    """Numbers that are asked for. Raises RequestError."""
    own = lease.engine.ready.embedding
    if own is None:
        raise UnsupportedParameter(
            f"model: the backend {lease.variant.backend} makes no embeddings", param="model"
        )
    if body.dimensions is not None and body.dimensions > own:
        raise RequestError(f"dimensions: this model's embeddings have {own}", param="dimensions")
    return body.dimensions or own


async def _tokens(item: str | list[int], lease: Lease) -> Sequence[int]:
    """Raises RequestError."""
    if isinstance(item, str):
        require_room(item, lease, "input")
        tokens = await lease.text.encode(item, add_special=True, parse_special=False) if item else []
    else:
        check_tokens(item, lease.text, "input")
        tokens = item
    context = lease.engine.ready.limits.context
    if not tokens:
        raise RequestError("input: must hold at least one token", param="input")
    if len(tokens) > context:
        raise ContextTooLong(
            f"input: the context is {context} tokens; this text has {len(tokens)}", param="input"
        )
    return tokens


def _shaped(vector: bytes, width: int, as_base64: bool) -> list[float] | str:
    """The first `width` numbers, of length 1 again."""
    if width * 4 < len(vector):
        vector = _cut(vector, width)
    return base64.b64encode(vector).decode() if as_base64 else _numbers(vector).tolist()


def _cut(vector: bytes, width: int) -> bytes:
    kept = _numbers(vector)[:width]
    length = math.hypot(*kept) or 1.0
    return _little_endian(array.array("f", (value / length for value in kept))).tobytes()


def _numbers(vector: bytes) -> "array.array[float]":
    return _little_endian(array.array("f", vector))


def _little_endian(values: "array.array[float]") -> "array.array[float]":
    if sys.byteorder == "big":
        values.byteswap()
    return values
