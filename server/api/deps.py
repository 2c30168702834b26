"""What every route works with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from quant.store import VariantStore
from server.api.auth import Keys
from server.api.edge import trace_of
from server.api.meters import Metrics
from server.api.responses.store import ResponseStore
from server.catalog import Catalog, CatalogError
from server.errors import Conflict
from server.pool.background import in_thread
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.select import is_listed, variant_id
from server.pool.states import Served
from server.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    pool: Pool
    jobs: Jobs
    store: VariantStore
    keys: Keys
    metrics: Metrics
    responses: ResponseStore = field(default_factory=ResponseStore)
    read_catalog: Callable[[], Catalog] | None = None  # models.yaml again; None: nothing to read
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time, for `created`

    began: float = field(default_factory=time.monotonic)  # the same by a clock that nobody sets

    @property
    def catalog(self) -> Catalog:
        return self.pool.catalog

    async def reload(self) -> None:
        """Serve what models.yaml says now. Raises Conflict, with every mistake, and then changes nothing."""
        if self.read_catalog is None:
            raise Conflict("the models of this run come from no file")
        try:
            self.pool.replace(await in_thread(self.read_catalog))
        except CatalogError as error:
            raise Conflict(f"models.yaml is not taken: {'; '.join(error.problems)[:1500]}") from error


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Using = Annotated[Services, Depends(services_of)]


def announce(request: Request, services: Services, name: str) -> None:
    """The variant that `name` asks for, put into the answer's X-Variant header. Raises UnknownModel.

    One that may not exist is only named once it answers: a refusal does not repeat what it was sent.
    """
    model, variant = services.pool.named(name)
    chosen = variant_id(model, variant or services.pool.default(model))
    trace = trace_of(request.scope)
    keeper = services.pool.gatekeeper
    if variant is None or is_listed(model, variant) or keeper.known(chosen):
        trace.headers["x-variant"] = chosen
    trace.late["x-gate"] = lambda: keeper.notice(trace.headers.get("x-variant", ""))


def correct(request: Request, served: Served) -> None:
    """Name the variant that really answers, where it is another than the one announced."""
    headers = trace_of(request.scope).headers
    if (asked := headers.get("x-variant")) != served.id:
        headers["x-variant"] = served.id
        if asked is not None:
            headers["x-fallback-for"] = asked
