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
from server.errors import ServerError
from server.logs import configure
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.states import ModelState
from server.settings import Settings

__all__ = ["configuration", "create_app", "run", "serve"]

log = logging.getLogger(__name__)

DRAIN_S = 30  # for running answers, after a signal
KEEP_ALIVE_S = 75
BACKLOG = 2048

Follow = Callable[[Callable[[], Sequence[ModelState]]], Coroutine[Any, Any, None]]


class Server(uvicorn.Server):
    """The first signal drains, the second ends at once; either way the process exits with 0."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._signalled = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """After a signal, further ones change nothing while the process ends: it is no crash."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._signalled else handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signalled = True
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_signal()


def run(
    settings: Settings,
    catalog: Catalog,
    *,
    follow: Follow | None = None,
    read_catalog: Callable[[], Catalog] | None = None,
) -> None:
    """Serve until a signal. `follow` runs beside the server and sees the pool's states; `read_catalog` reads
    the models again, for SIGHUP and /admin/reload."""
    configure(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, catalog, follow=follow, read_catalog=read_catalog))


async def serve(
    settings: Settings,
    catalog: Catalog,
    *,
    follow: Follow | None = None,
    read_catalog: Callable[[], Catalog] | None = None,
) -> None:
    store = VariantStore(settings.cache, max_bytes=settings.cache_max_bytes)
    jobs = Jobs(settings, store)
    pool = Pool(settings, catalog, store, jobs)
    app = create_app(settings, pool, jobs, store, read_catalog)
    reloads = Reloads(app.state.services.reload)
    following = asyncio.ensure_future(follow(pool.states)) if follow else None
    try:
        with reloads.on_hangup():
            await Server(configuration(app, settings), pool.drain).serve()
    finally:
        if following is not None:
            await cancelled(following)


class Reloads:
    """SIGHUP reads models.yaml again. A file with mistakes is told in the log, and nothing changes."""

    def __init__(self, reload: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._reload = reload
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def on_hangup(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._begin)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _begin(self) -> None:
        task = asyncio.ensure_future(self._try())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try(self) -> None:
        try:
            await self._reload()
        except ServerError as error:
            log.error("%s", error)
        else:
            log.info("models.yaml was read again")


def configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="none",  # `run` has chosen it
        http=bounded(settings.body_wait_s, settings.write_wait_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a peer on this machine may be an administrator: no header changes who it is
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
