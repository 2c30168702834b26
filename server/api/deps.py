"""What every route works with."""

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from quant.store import VariantStore
from server.api.auth import Keys
from server.api.edge import trace_of
from server.api.meters import Metrics
from server.api.responses.store import ResponseStore
from server.catalog import Catalog
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.states import Served
from server.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    catalog: Catalog
    pool: Pool
    jobs: Jobs
    store: VariantStore
    keys: Keys
    metrics: Metrics
    responses: ResponseStore = field(default_factory=ResponseStore)
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time, for `created`


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Using = Annotated[Services, Depends(services_of)]


def announce(request: Request, services: Services, name: str) -> str:
    """The variant that `name` asks for, put into the answer's X-Variant header. Raises UnknownModel."""
    model, variant = services.catalog.resolve(name)
    chosen = f"{model.id}:{variant or model.default}"
    trace_of(request.scope).headers["x-variant"] = chosen
    return chosen


def correct(request: Request, served: Served) -> None:
    """Name the variant that really answers, where it is another than the one announced."""
    headers = trace_of(request.scope).headers
    if (asked := headers.get("x-variant")) != served.id:
        headers["x-variant"] = served.id
        headers["x-fallback-for"] = asked or ""
