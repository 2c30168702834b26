"""Jobs beyond starting a build: pulls, what happened to a job as it happens, and what its process wrote."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from server.api.body import json_body
from server.api.deps import Using
from server.api.schema.admin import PullRequest
from server.api.sse import Plain, open_stream, safe_lines
from server.errors import RequestError
from server.pool.jobs import Jobs
from server.pool.records import FINAL

router = APIRouter(tags=["admin"])

NUMBER = re.compile(r"\d{1,15}")


@router.post("/admin/pull", status_code=202)
async def pull(body: Annotated[PullRequest, Depends(json_body(PullRequest))], services: Using) -> Response:
    """The job that fetches the source of a model; the running one where it is being fetched."""
    model, variant = services.catalog.resolve(body.model)
    if variant is not None:
        raise RequestError("model: name the model alone; its variants share one source", param="model")
    job = services.jobs.pull(model, priority=body.priority)
    return Response(msgspec.json.encode(job), 202, media_type="application/json")


@router.get("/quantize/{job}/events")
async def job_events(job: str, request: Request, services: Using) -> Response:
    """Server-sent events from the job's beginning, or from Last-Event-ID, to its end.

    204 where everything was sent already: that tells a browser's EventSource not to come back.
    """
    after = _last_seen(request.headers.get("last-event-id"))
    events = services.jobs.events(job, after)
    if not events and services.jobs.get(job).state in FINAL:
        return Response(status_code=204)
    return await open_stream(
        request.receive, _frames(services.jobs, job, after), services.settings.ping_s, Plain(end=b"")
    )


@router.get("/quantize/{job}/log")
async def job_log(job: str, services: Using) -> Response:
    """The last lines that the job's process wrote, oldest first."""
    lines = [msgspec.json.decode(e.data, type=str) for e in services.jobs.events(job, 0) if e.name == "log"]
    return Response("".join(f"{line}\n" for line in lines), media_type="text/plain")


def _last_seen(value: str | None) -> int:
    if not value:
        return 0
    if not NUMBER.fullmatch(value):
        raise RequestError("Last-Event-ID is the id of an event of this job")
    return int(value)


async def _frames(jobs: Jobs, id: str, after: int) -> AsyncGenerator[bytes]:
    async with aclosing(jobs.follow(id, after)) as events:
        async for event in events:
            head = f"id: {event.number}\nevent: {event.name}\ndata: ".encode()
            yield head + safe_lines(event.data) + b"\n\n"
