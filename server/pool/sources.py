"""Sources of models, opened in a thread and without the network; builds do what needs the network."""

import asyncio
from functools import partial
from pathlib import Path

from quant.errors import BadSource
from quant.source import Source, open_source
from server.catalog import Model
from server.pool.background import in_thread
from server.pool.hidden import without_source


def is_hub(model: Model) -> bool:
    """Sources in a catalog are absolute paths or hub ids."""
    return not model.source.startswith("/")


class Sources:
    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._opening: dict[tuple[str, str | None], asyncio.Task[Source]] = {}
        self._known: dict[tuple[str, str | None], Source] = {}

    async def open(self, model: Model) -> Source:
        """Callers at the same time share one reading. Raises BadSource, also for a hub id not pulled yet."""
        name = (model.source, model.revision)
        task = self._opening.get(name)
        if task is None:
            task = self._opening[name] = asyncio.create_task(self._open(name))
            task.add_done_callback(partial(self._opened, name))
        return await asyncio.shield(task)

    def known(self, model: Model) -> Source | None:
        """The source as it was opened last."""
        return self._known.get((model.source, model.revision))

    async def _open(self, name: tuple[str, str | None]) -> Source:
        """What is wrong is told to those who ask for the model, without its place."""
        ref, revision = name
        opening = partial(open_source, ref, cache=self._cache, revision=revision, local_only=True)
        try:
            return await in_thread(opening)
        except BadSource as error:
            if ref.startswith("/") and not Path(ref).exists():
                raise BadSource("its source is not on this machine any more") from error
            raise type(error)(without_source(str(error), ref, revision)) from error

    def _opened(self, name: tuple[str, str | None], task: "asyncio.Task[Source]") -> None:
        del self._opening[name]
        if not task.cancelled() and task.exception() is None:
            self._known[name] = task.result()
