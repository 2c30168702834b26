"""/admin/status: everything that runs, in one answer. /admin/reload: models.yaml read again."""

import time
from collections import Counter

import msgspec
from fastapi import APIRouter, Response
from msgspec import Struct

from server.api.deps import Using
from server.api.health import own_version
from server.pool.states import EngineState

router = APIRouter(tags=["admin"])


class EngineCard(Struct, frozen=True, kw_only=True):
    model: str
    variant: str
    backend: str
    pid: int
    users: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_total_tokens: int
    restarts: int


class DeviceCard(Struct, frozen=True, kw_only=True):
    budget: int  # bytes
    held: int


class ModelStatus(Struct, frozen=True, kw_only=True):
    id: str
    variant: str
    state: str
    error: str | None


class StatusReport(Struct, frozen=True, kw_only=True):
    version: str
    uptime_s: float
    models: list[ModelStatus]
    engines: list[EngineCard]
    memory: dict[str, DeviceCard]
    loads_waiting: int  # for memory
    jobs: dict[str, int]  # by state


class Reloaded(Struct, frozen=True, kw_only=True):
    models: list[str]


@router.get("/admin/status")
async def admin_status(services: Using) -> Response:
    pool = services.pool
    held = pool.memory.held
    report = StatusReport(
        version=own_version(),
        uptime_s=round(time.monotonic() - services.began, 1),
        models=[
            ModelStatus(id=state.model.id, variant=state.variant, state=state.state, error=state.error)
            for state in pool.states()
        ],
        engines=[_engine(engine) for engine in pool.engines()],
        memory={
            device: DeviceCard(budget=budget, held=held.get(device, 0))
            for device, budget in pool.memory.budgets.items()
        },
        loads_waiting=pool.memory.waiting,
        jobs=dict(Counter(job.state for job in services.jobs.list())),
    )
    return _json(report)


@router.post("/admin/reload")
async def reload_models(services: Using) -> Response:
    """Models that did not change go on; a file with mistakes changes nothing: a 409 with all of them."""
    await services.reload()
    return _json(Reloaded(models=[model.id for model in services.catalog.models]))


def _engine(engine: EngineState) -> EngineCard:
    status = engine.status
    return EngineCard(
        model=engine.served.model,
        variant=engine.served.id,
        backend=engine.served.backend,
        pid=engine.pid,
        users=engine.users,
        running=status.running,
        waiting=status.waiting,
        kv_used_tokens=status.kv_used_tokens,
        kv_total_tokens=status.kv_total_tokens,
        restarts=engine.restarts,
    )


def _json(value: Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
