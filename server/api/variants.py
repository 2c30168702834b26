"""What is known of variants, for administrators: their reports, and which of them answers to a bare name."""

from functools import partial
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Struct
from msgspec.structs import replace

from quant.measure.report import Judged, Report, as_html, as_json, report_of
from server.api.deps import Services, Using
from server.catalog import Model
from server.errors import NotFound, RequestError
from server.pool.background import in_thread
from server.pool.promoting import Promoter
from server.pool.select import variant_id

router = APIRouter(tags=["admin"])


class Promotion(Struct, frozen=True, kw_only=True):
    model: str
    variant: str  # that answers to the model's bare name from now on
    before: str  # that did until now
    label: str  # what is known of its quality


@router.get("/admin/report/{variant}")
async def report(variant: str, request: Request, services: Using) -> Response:
    """A page for browsers, JSON for everybody else."""
    model, subject, others = await _known(services, variant)
    found = _placeless(report_of(model.id, subject, others, model.id))
    if "text/html" in request.headers.get("accept", ""):
        page = await in_thread(partial(as_html, found, others))  # with pictures, which takes a second
        return Response(page, media_type="text/html")
    return Response(as_json(found), media_type="application/json")


def _placeless(found: Report) -> Report:
    """Of a folder of this machine the name alone: administrators need not be users of it."""
    source = found.source
    if source.id.startswith("/"):
        source = replace(source, id=Path(source.id).name)
    return replace(found, source=source)


@router.post("/admin/variants/{variant}/promote")
async def promote(variant: str, services: Using) -> Response:
    """Build, measure and load it; then it answers to the model's bare name, and the one before ends."""
    model, name = services.catalog.resolve(variant)
    if name is None:
        raise RequestError("name a variant, as model:variant", param="variant")
    before = services.pool.default(model)
    lease = await Promoter(services.pool, services.jobs).promote(model, name)
    return _promotion(model, before, lease.variant.id, lease.variant.label)


@router.post("/admin/variants/{variant}/rollback")
async def rollback(variant: str, services: Using) -> Response:
    """What answered before the last promotion answers again; `variant`: the model, or any variant of it."""
    model, _ = services.catalog.resolve(variant)
    before = services.pool.default(model)
    lease = await Promoter(services.pool, services.jobs).roll_back(model)
    return _promotion(model, before, lease.variant.id, lease.variant.label)


async def _known(services: Services, variant: str) -> tuple[Model, Judged, list[Judged]]:
    """Raises NotFound for what is not built."""
    model, name = services.catalog.resolve(variant)
    await services.pool.look_again()
    keeper = services.pool.gatekeeper
    subject = keeper.known(variant_id(model, name or services.pool.default(model)))
    if subject is None:
        raise NotFound("there is no such variant; only what this server has built has a report")
    return model, subject, keeper.of_model(model)


def _promotion(model: Model, before: str, after: str, label: str) -> Response:
    found = Promotion(model=model.id, variant=after, before=variant_id(model, before), label=label)
    return Response(msgspec.json.encode(found), media_type="application/json")
