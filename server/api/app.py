"""All routes in one application."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from starlette.types import Receive, Scope, Send

from quant.store import VariantStore
from server.api import admin, chat, completions, embeddings, health, metrics, models, status, tokens, variants
from server.api import jobs as job_routes
from server.api.auth import Keys, authenticate, caller_of
from server.api.deps import Services
from server.api.edge import Edge
from server.api.errors import install_error_handlers
from server.api.hosts import Hosts
from server.api.ignored import name_query
from server.api.limits import Limited
from server.api.messages import routes as messages
from server.api.meters import Metrics
from server.api.openapi import routes as openapi
from server.api.responses import routes as responses
from server.catalog import Catalog
from server.errors import NotFound
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.settings import Settings

ROUTERS = (
    chat.router,
    completions.router,
    embeddings.router,
    messages.router,
    responses.router,
    models.router,
    tokens.router,
    admin.router,
    job_routes.router,
    status.router,
    variants.router,
    health.router,
    metrics.router,
    openapi.router,
)


def create_app(
    settings: Settings,
    pool: Pool,
    jobs: Jobs,
    store: VariantStore,
    read_catalog: Callable[[], Catalog] | None = None,
) -> FastAPI:
    """Starts and closes pool and jobs with its own life. Raises ValueError for a keys file without keys."""
    services = Services(
        settings=settings,
        pool=pool,
        jobs=jobs,
        store=store,
        keys=Keys.read(settings),
        metrics=Metrics(pool, jobs),
        read_catalog=read_catalog,
    )
    app = FastAPI(
        title="quantserve",
        version=health.own_version(),
        lifespan=_lifespan,
        dependencies=[Depends(authenticate), Depends(name_query)],
        openapi_url=None,  # FastAPI's own routes would not ask for a key
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.routers = ROUTERS
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.router.default = _unknown_route
    app.add_middleware(Limited, keys=services.keys, settings=settings)
    app.add_middleware(
        Edge,
        hosts=Hosts.of(settings),
        body_limit=settings.body_limit,
        body_wait_s=settings.body_wait_s,
        ended=services.metrics.ended,
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.jobs.start()
    await services.pool.start()
    try:
        yield
    finally:
        await services.pool.close()
        await services.jobs.close()


async def _unknown_route(scope: Scope, receive: Receive, send: Send) -> None:
    """Without a key nobody learns which routes there are."""
    caller_of(scope["app"].state.services.keys, scope)
    raise NotFound("there is no such route")
