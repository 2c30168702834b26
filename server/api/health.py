"""The probes: alive, ready, which version. Only the first two answer without a key, and to HEAD, whose body
the protocol below leaves out."""

from importlib.metadata import PackageNotFoundError, version

import msgspec
from fastapi import APIRouter, Response
from msgspec import Struct

from server.api.deps import Using
from server.api.envelope import Detail
from server.errors import ModelLoading

router = APIRouter(tags=["operations"])


class Alive(Struct, frozen=True, kw_only=True):
    status: str = "ok"


class Waiting(Struct, frozen=True, kw_only=True):
    """A preloaded model that is not ready."""

    id: str
    state: str


class Readiness(Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: str
    models: list[Waiting] = []
    error: Detail | None = None


class Version(Struct, frozen=True, kw_only=True):
    version: str


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Response:
    return _json(Alive())


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(services: Using) -> Response:
    """200 once every model with `preload: true` is ready; one that was unloaded since is not missed."""
    waiting = [
        Waiting(id=state.model.id, state=state.state)
        for state in services.pool.states()
        if state.model.preload and state.state != "ready" and not state.rests
    ]
    if not waiting:
        return _json(Readiness(status="ready"))
    detail = Detail(
        message="not every preloaded model is ready",
        type=ModelLoading.kind,
        param=None,
        code=ModelLoading.code,
    )
    response = _json(Readiness(status="loading", models=waiting, error=detail), 503)
    response.headers["Retry-After"] = "1"
    return response


@router.get("/version")
async def show_version() -> Response:
    return _json(Version(version=own_version()))


def own_version() -> str:
    try:
        return version("quantserve")
    except PackageNotFoundError:
        return "unknown"  # run from a folder that was never installed


def _json(value: Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
