"""The web process: the parts put together, listening until a signal ends it."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from quant.store import VariantStore
from server.api.app import create_app
from server.api.leaving import cancelled
from server.api.protocol import bounded
from server.catalog import Catalog
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.states import ModelState
from server.settings import Settings

__all__ = ["configuration", "create_app", "run", "serve"]

DRAIN_S = 30  # for running answers, after a signal
KEEP_ALIVE_S = 75
BACKLOG = 2048

Follow = Callable[[Callable[[], Sequence[ModelState]]], Coroutine[Any, Any, None]]


class Server(uvicorn.Server):
    """The first signal drains, the second ends at once; either way the process exits with 0."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_signal()


def run(settings: Settings, catalog: Catalog, *, follow: Follow | None = None) -> None:
    """Serve until a signal. `follow` runs beside the server and sees the pool's states."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, catalog, follow=follow))


async def serve(settings: Settings, catalog: Catalog, *, follow: Follow | None = None) -> None:
    store = VariantStore(settings.cache, max_bytes=settings.cache_max_bytes)
    jobs = Jobs(settings, store)
    pool = Pool(settings, catalog, store, jobs)
    app = create_app(settings, catalog, pool, jobs, store)
    following = asyncio.ensure_future(follow(pool.states)) if follow else None
    try:
        await Server(configuration(app, settings), pool.drain).serve()
    finally:
        if following is not None:
            await cancelled(following)


def configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="none",  # `run` has chosen it
        http=bounded(settings.body_wait_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a peer on this machine may be an administrator: no header changes who it is
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
