"""One variant of one model: its engine, who uses it, what went wrong with it.

All of it lives in the event loop, and no decision has an `await` between looking and acting: an engine that
somebody uses is never unloaded, and two loads of one variant never run at once.
"""

import asyncio
import logging
import math
import time

from server.catalog import Model
from server.errors import (
    EngineDied,
    MemoryBusy,
    ModelLoading,
    ModelUnavailable,
    ServerError,
    ShuttingDown,
)
from server.pool import policy
from server.pool.loader import Loaded, Loader, LoadFailed, Watch
from server.pool.memory import Memory, NoRoom
from server.pool.room import Room
from server.pool.select import variant_id
from server.pool.states import LoadState
from server.pool.uses import NONE, Use
from server.process.client import EngineClient

log = logging.getLogger(__name__)

STEP_BACK_S = 0.5


class VariantHost:
    def __init__(self, model: Model, name: str, loader: Loader, memory: Memory) -> None:
        self.model = model
        self.name = name
        self.id = variant_id(model, name)
        self.watch = Watch()
        self.history = policy.History()
        self.restarts = 0
        self.loads = 0
        self.lasting = False  # the last failure would come again
        self.rests = False  # unloaded on purpose: the next request loads it again
        self.patient = True  # wait for memory that others use, rather than let a smaller variant answer
        self._loader = loader
        self._memory = memory
        self._no_room: NoRoom | None = None  # why the last load was not tried
        self._back = 0  # users that wait until this engine has made room for another
        self._loaded: Loaded | None = None
        self._users = 0
        self._idle_since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._closed = False
        self._retired = False
        self._room = Room(self.id, memory)

    @property
    def loaded(self) -> Loaded | None:
        return self._loaded

    @property
    def users(self) -> int:
        """Requests that use the engine or wait for it."""
        return self._users

    @property
    def busy(self) -> bool:
        """Must not be unloaded now: a request uses it, or is about to."""
        return self._loading is not None or self._users > self._back

    @property
    def idle_s(self) -> float:
        return 0.0 if self.busy else time.monotonic() - self._idle_since

    def evict(self) -> None:
        assert not self.busy, "an engine that somebody uses is never unloaded"
        self._unload()

    @property
    def no_room(self) -> bool:
        """The last load was not tried for lack of memory."""
        return self._no_room is not None

    @property
    def state(self) -> LoadState:
        if self._loaded is not None:
            return "ready"
        if self._loading is not None:
            return self.watch.state
        if (refused := self.refusal()) and refused.quarantined:
            return "quarantined"
        return "failed" if self.history.failures else "unloaded"

    @property
    def error(self) -> str | None:
        if self.state not in ("failed", "quarantined"):
            return None
        refused = self.refusal()
        return refused.reason if refused else self.history.reason

    def refusal(self) -> policy.Refusal | None:
        return policy.refusal(self.history, time.monotonic())

    async def acquire(self, wait_s: float | None, uses: frozenset[Use] = NONE) -> Loaded:
        """Wait for the engine, loading it if need be, and hold it until `release`. It has room for `uses`.

        Raises ModelLoading after `wait_s`, ModelUnavailable, MemoryBusy, ShuttingDown.
        """
        self._users += 1
        try:
            return await self._engine(wait_s, uses)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self._users -= 1
        self._idle_since = time.monotonic()
        self._renew()
        self._plan_unload()
        if not self.busy:
            self._memory.look()

    def load(self) -> "asyncio.Task[None]":
        """The one load that is running, or a new one. It never fails: what went wrong is in `history`."""
        if self._loading is None:
            self.watch = Watch()
            self._no_room = None
            self._loading = asyncio.create_task(self._load(), name=f"load {self.id}")
        return self._loading

    def retire(self) -> None:
        """Nobody needs the engine any more: it ends as soon as those who use it have their answers."""
        self._retired = True
        self._plan_unload()

    async def close(self) -> None:
        """End the load or the engine. May be called again."""
        self._closed = True
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
            self._loading = None  # where it was cancelled before it began
        self._unload()
        if self._unloading is not None:
            await asyncio.wait({self._unloading})

    # -- waiting ----------------------------------------------------------------------------------

    async def _engine(self, wait_s: float | None, uses: frozenset[Use]) -> Loaded:
        self._room.uses |= uses
        began = time.monotonic()
        limit = math.inf if wait_s is None else time.monotonic() + wait_s
        waited = False
        while True:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            left = limit - time.monotonic()
            if (loaded := self._loaded) is not None:
                hurried = waited or left <= 0  # a load serves at least those who waited for it
                if (hurried or not self._memory.yields(self.id)) and self._allows(loaded, uses):
                    return loaded
                if left <= 0 or (uses - loaded.uses and time.monotonic() - began > self._memory.wait_s):
                    self._room.renews = False
                    raise self._crowded(NoRoom(f"{self.id} needs memory that other models are using"))
                await self._step_back(left)
                continue
            refused = self.refusal()
            if refused and (waited or self._loading is None):
                raise self._unavailable(refused)
            if waited and self._no_room is not None:
                raise self._crowded(self._no_room)
            done, _ = await asyncio.wait({self.load()}, timeout=_finite(max(0.0, left)))
            if not done:
                raise self._still_loading()
            waited = True

    def _allows(self, loaded: Loaded, uses: frozenset[Use]) -> bool:
        try:
            return self._room.allows(loaded, uses)
        except NoRoom as error:
            raise self._crowded(error) from None

    async def _step_back(self, seconds: float) -> None:
        """Wait until the engine is unloaded for another, or need not be any more; meanwhile it may be."""
        self._back += 1
        self._renew()
        self._memory.look()
        try:
            moved = asyncio.ensure_future(self._memory.moved())
            await asyncio.wait({moved}, timeout=min(seconds, STEP_BACK_S))
            moved.cancel()
        finally:
            self._back -= 1

    def _crowded(self, why: NoRoom) -> ServerError:
        if why.never:
            return ModelUnavailable(
                f"{why} (QUANTSERVE_MEMORY_BUDGET)", param="model", retry_after=policy.CROWDED_RETRY_S
            )
        return MemoryBusy(str(why), param="model", retry_after=policy.LOADING_RETRY_S)

    def _unavailable(self, refused: policy.Refusal) -> ModelUnavailable:
        what = "is in quarantine" if refused.quarantined else "cannot be served"
        return ModelUnavailable(
            f"{self.id} {what}: {refused.reason}", param="model", retry_after=math.ceil(refused.retry_s)
        )

    def _still_loading(self) -> ModelLoading:
        if self.watch.state == "building":
            text = f"{self.id} is being built (job {self.watch.job}); try again later"
            return ModelLoading(text, retry_after=policy.BUILDING_RETRY_S)
        return ModelLoading(f"{self.id} is being loaded; try again later", retry_after=policy.LOADING_RETRY_S)

    # -- loading ----------------------------------------------------------------------------------

    async def _load(self) -> None:
        try:
            if self._unloading is not None:  # its memory first
                await asyncio.wait({self._unloading})
            await self._attempts()
        except NoRoom as error:
            self._no_room = error
            self.lasting = error.never
            log.warning("%s is not loaded: %s", self.id, error)
        except LoadFailed as error:
            self._failed(str(error), lasting=error.lasting)
        except Exception as error:
            log.exception("loading %s went wrong", self.id)
            self._failed(f"an internal error ({type(error).__name__})")
        finally:
            self._loading = None
            if not self.busy:
                self._memory.look()

    async def _attempts(self) -> None:
        """Load; where the engine dies meanwhile, again, but not for ever."""
        for _ in range(policy.DEATHS):
            await asyncio.sleep(policy.restart_delay_s(self.history, time.monotonic()))
            try:
                loaded = await self._loader.load(
                    self.model,
                    self.name,
                    self.watch,
                    self,
                    patient=self.patient,
                    uses=self._room.uses,
                )
            except EngineDied as error:
                self._died(str(error))
            else:
                if not loaded.engine.dead:
                    self._begin(loaded)
                    return
                self._died(f"the engine {loaded.engine.death} when it was just ready")
                await loaded.close()
            if self.refusal():
                return
        raise LoadFailed(
            f"its engine died {policy.DEATHS} times while loading, at last: {self.history.reason}"
        )

    def _begin(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.rests = False
        self.loads += 1
        self.history = policy.after_success(self.history)
        self.lasting = False
        self._retired = False
        self._idle_since = time.monotonic()
        loaded.engine.on_death = self._engine_died
        self._plan_unload()
        log.info("%s is ready (engine %d)", self.id, loaded.engine.pid)

    def _failed(self, reason: str, *, lasting: bool = False) -> None:
        self.history = policy.after_failure(self.history, time.monotonic(), reason)
        self.lasting = lasting
        log.error("%s cannot be loaded: %s", self.id, reason)

    def _died(self, reason: str) -> None:
        self.history = policy.after_death(self.history, time.monotonic(), reason)
        log.error("%s: %s", self.id, reason)

    def _engine_died(self, engine: EngineClient) -> None:
        """Called once, by the engine's client; starts the next engine at once, in the background."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded.engine is not engine:
            return
        self._unloading = asyncio.create_task(loaded.close(), name=f"bury {self.id}")
        if engine.killed_at_work:  # no crash: nothing says that the next one would die of the same
            log.error("%s: the engine %s, and is started again", self.id, engine.death)
        else:
            self._died(f"the engine {engine.death}")
        if not self._closed and self.refusal() is None:
            self.restarts += 1
            self.load()

    # -- unloading --------------------------------------------------------------------------------

    def _plan_unload(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loaded is None:
            return
        delay = policy.unload_in_s(
            users=self._users,
            idle_since=self._idle_since,
            keep_alive=0.0 if self._retired else self.model.keep_alive,
            now=time.monotonic(),
        )
        if delay is not None:
            self._timer = asyncio.get_running_loop().call_later(delay, self._unload_if_idle)

    def _unload_if_idle(self) -> None:
        self._timer = None
        if self._users == 0:
            self._unload()

    def _renew(self) -> None:
        if self._room.renews and not self.busy:
            log.info("%s is unloaded to be loaded with more room", self.id)
            self._unload()

    def _unload(self) -> None:
        self._room.unloaded()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            log.info("%s is unloaded", self.id)
            self.rests = True
            self._unloading = asyncio.create_task(loaded.close(), name=f"unload {self.id}")


def _finite(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds
