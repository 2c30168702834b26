"""Moving a model's bare name from one variant to another while requests run."""

from collections.abc import Callable
from functools import partial

from server.catalog import Model
from server.errors import Conflict, DiskFull
from server.pool.background import in_thread
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.pool.select import variant_id
from server.pool.states import Lease


class Promoter:
    def __init__(self, pool: Pool, jobs: Jobs) -> None:
        self._pool = pool
        self._jobs = jobs

    async def promote(self, model: Model, name: str) -> Lease:
        """Let `name` answer to the model's bare name, once it is built, measured, allowed and loaded.

        The one before ends when its last answer is out. Raises what `acquire` raises, Conflict, DiskFull.
        """
        if model.is_ready:
            raise Conflict(f"{model.id} is served as it is; there is nothing to promote")
        before = self._pool.default(model)
        if name == before:
            raise Conflict(f"{variant_id(model, name)} answers to {model.id} already")
        return await self._flip(model, name, partial(self._pool.promotions.promote, model.id, name, before))

    async def roll_back(self, model: Model) -> Lease:
        """To the last variant that answered before and is still there. Raises what `promote` raises."""
        promoted = self._pool.promotions.of(model.id)
        for name in reversed(promoted.before if promoted else ()):
            if name != self._pool.default(model) and await self._pool.is_there(model, name):
                write = partial(self._pool.promotions.roll_back, model.id, name)
                return await self._flip(model, name, write)
        raise Conflict(f"nothing that is still there was promoted over in {model.id}")

    async def _flip(self, model: Model, name: str, write: Callable[[], None]) -> Lease:
        """The new engine is ready before the name moves, so that at no moment nobody answers."""
        before = self._pool.default(model)
        async with self._pool.acquire(f"{model.id}:{name}", wait_s=None) as lease:
            await self._measured(model, name)
            try:
                await in_thread(write)
            except OSError as error:
                raise DiskFull(f"the promotion cannot be written ({error.strerror})") from error
        if (old := self._pool.hosted(variant_id(model, before))) is not None and self._pool.default(
            model
        ) != before:
            old.retire()
        return lease

    async def _measured(self, model: Model, name: str) -> None:
        """Wait for a measurement for as long as it takes. Raises VariantRejected."""
        known = self._pool.gatekeeper.known(variant_id(model, name))
        if known is not None and known.measurement is None:
            await self._jobs.wait(self._pool.gatekeeper.submit(model, known.variant, quick=True).id)
            await in_thread(partial(self._pool.gatekeeper.look, model, known.variant))
        self._pool.gatekeeper.require_allowed(model, name)
