"""What all doors that generate text do around `ask`: whole answers, and frames of a stream."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from fastapi import Request, Response

from server.api.chunks import Chunks
from server.api.deadline import within
from server.api.deps import Services, announce, correct
from server.api.generate import Begun, Part, Planner, ask
from server.api.leaving import unless_gone
from server.api.schema.sampling import Sampling
from server.api.sse import PLAIN, Voice, open_stream
from server.api.whole import Whole, collect
from server.pool.states import Served


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def now() -> int:
    return int(time.time())


def fingerprint(served: Served) -> str:
    """Names the variant; changes when its bytes do."""
    return f"{served.id}@{served.key[:12]}"


async def answer_whole(
    request: Request,
    services: Services,
    body: Sampling,
    plan: Planner,
    shape: Callable[[Whole], msgspec.Struct],
) -> Response:
    announce(request, services, body.model)
    parts = within(ask(services, body.model, plan, wait_s=services.settings.build_wait_s), body.timeout)
    whole = await unless_gone(request.receive, collect(parts))
    correct(request, whole.begun.served)
    return Response(msgspec.json.encode(shape(whole)), media_type="application/json")


async def answer_stream(
    request: Request,
    services: Services,
    body: Sampling,
    plan: Planner,
    shape: Callable[[Begun], Chunks],
    voice: Voice = PLAIN,
) -> Response:
    """A stream waits for a model as long as its client does."""
    announce(request, services, body.model)
    frames = _frames(request, within(ask(services, body.model, plan, wait_s=None), body.timeout), shape)
    return await open_stream(request.receive, frames, services.settings.ping_s, voice)


async def _frames(
    request: Request, parts: AsyncGenerator[Part], shape: Callable[[Begun], Chunks]
) -> AsyncGenerator[bytes]:
    async with aclosing(parts):
        begun = await anext(parts)
        assert isinstance(begun, Begun), "parts start with Begun"
        correct(request, begun.served)
        chunks = shape(begun)
        async for part in parts:
            if data := chunks.frames(part):
                yield data
