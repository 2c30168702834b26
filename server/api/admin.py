"""Building variants over HTTP: names of models.yaml and recipes only, never a path or URL."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Response
from msgspec import Struct

from quant.errors import BadRecipe
from quant.files import unshown
from quant.recipe import parse_recipe
from quant.search.target import Target, parse_target
from server.api.body import json_body
from server.api.deps import Using
from server.api.schema.admin import QuantizeRequest
from server.errors import RequestError
from server.pool.jobs import Job

router = APIRouter(tags=["admin"])


class JobList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Job]


@router.post("/quantize", status_code=202)
async def quantize(
    body: Annotated[QuantizeRequest, Depends(json_body(QuantizeRequest))], services: Using
) -> Response:
    """The job: done at once where the variant exists, the running one where it is being built.

    With a target: the job that finds the recipe which meets it.
    """
    model, variant = services.catalog.resolve(body.model)
    if variant is not None:
        raise RequestError("model: name the model alone; the recipe names the variant", param="model")
    if body.target is not None:
        job = await services.jobs.search(model, _target(body.target), priority=body.priority)
        return _json(job, 202)
    spec = body.recipe if body.preset is None else body.preset
    assert spec is not None, "checked by QuantizeRequest"
    with unshown():
        recipe = parse_recipe(spec)
    job = await services.jobs.submit(model, recipe, priority=body.priority)
    return _json(job, 202)


@router.get("/quantize")
async def jobs(services: Using) -> Response:
    return _json(JobList(data=list(services.jobs.list())))


@router.get("/quantize/{job}")
async def job(job: str, services: Using) -> Response:
    return _json(services.jobs.get(job))


@router.delete("/quantize/{job}")
async def cancel(job: str, services: Using) -> Response:
    """Stop a job that has not finished; forget one that has."""
    return _json(await services.jobs.remove(job))


def _target(value: dict[str, Any]) -> Target:
    try:
        return parse_target(value)
    except BadRecipe as error:
        raise RequestError(f"target: {error}", param="target") from error


def _json(value: Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
