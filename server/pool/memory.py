"""Who holds how much memory, whose turn it is to load, and who has to go for that.

A budget for each device. An engine's room is reserved before its process starts and is given back when that
process is gone, so that the sum never passes the budget. Loads are let in one after the other, in the order
in which they came; idle engines are unloaded for them, busy ones never. Where all are busy and the first
in the queue has waited a while, the cheapest are to run out: they take no new requests until it was its turn.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.pool.policy import Bytes, Tenancy, missing_bytes, victims
from server.pool.uses import NONE, Use

log = logging.getLogger(__name__)

WAIT_S = 30.0  # for room, before those who ask are told to come back
PATIENCE_S = 2.0  # before busy engines are asked to run out


class NoRoom(Exception):
    """`never`: not even an empty machine would do. The message is one line for a client."""

    def __init__(self, reason: str, *, never: bool = False) -> None:
        super().__init__(reason)
        self.never = never


class Tenant(Protocol):
    """Whoever holds memory."""

    @property
    def id(self) -> str: ...

    @property
    def busy(self) -> bool:
        """A request uses it, or is about to."""
        ...

    @property
    def idle_s(self) -> float: ...

    def evict(self) -> None:
        """Unload an engine that is not busy; its claim ends when its process is gone."""
        ...


@dataclass(slots=True, eq=False)
class Claim:
    """Reserved room. `used`: what was measured last, where that is more than was reserved."""

    memory: "Memory"
    tenant: Tenant
    need: Bytes
    reload_s: float
    uses: frozenset[Use] = NONE  # that there is room for
    used: dict[str, int] = field(default_factory=dict)
    leaving: bool = False

    @property
    def bytes(self) -> Bytes:
        return {device: max(amount, self.used.get(device, 0)) for device, amount in self.need.items()}

    def release(self) -> None:
        """May be called again."""
        self.memory.released(self)


Growth = Literal["granted", "soon", "no"]


@dataclass(slots=True, eq=False)
class _Waiting:
    tenant: Tenant
    need: Bytes
    reload_s: float
    patient: bool
    since: float
    granted: "asyncio.Future[Claim]"


class Memory:
    def __init__(self, budgets: Mapping[str, int], *, wait_s: float = WAIT_S) -> None:
        self.budgets = dict(budgets)
        self.evictions: dict[str, int] = {}  # by tenant
        self.wait_s = wait_s
        self._claims: list[Claim] = []
        self._queue: list[_Waiting] = []
        self._yielding: set[str] = set()  # busy ones that shall run out
        self._moved = asyncio.Event()

    @property
    def held(self) -> dict[str, int]:
        """Bytes by device, reserved or used."""
        total = dict.fromkeys(self.budgets, 0)
        for claim in self._claims:
            for device, amount in claim.bytes.items():
                total[device] = total.get(device, 0) + amount
        return total

    @property
    def waiting(self) -> int:
        """Loads that wait for room."""
        return len(self._queue)

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(self._claims)

    async def reserve(self, tenant: Tenant, need: Bytes, reload_s: float, *, patient: bool = True) -> Claim:
        """Room for an engine, in turn. Raises NoRoom: after `wait_s`, or at once where not `patient`."""
        self._refuse_what_never_fits(tenant, need)
        granted: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(tenant, need, reload_s, patient, time.monotonic(), granted)
        self._queue.append(waiting)
        try:
            self.look()
            async with asyncio.timeout(self.wait_s):
                await self._settled(waiting)
        except TimeoutError:
            if not granted.done():
                raise _crowded(tenant) from None
        except BaseException:
            if granted.done() and granted.exception() is None:
                granted.result().release()
            raise
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
            self.look()
        return granted.result()

    def grow(self, claim: Claim, extra: Bytes, uses: frozenset[Use]) -> Growth:
        """More room for an engine that is loaded. "soon": idle ones are going for it; ask again."""
        missing = missing_bytes(self.budgets, (other.bytes for other in self._claims), extra)
        if all(amount <= 0 for amount in missing.values()):
            claim.need = {device: amount + extra.get(device, 0) for device, amount in claim.bytes.items()}
            claim.uses |= uses
            return "granted"
        staying = [other.bytes for other in self._claims if not other.leaving]
        after = missing_bytes(self.budgets, staying, extra)
        if all(amount <= 0 for amount in after.values()):
            return "soon"
        others = [one for one in self._tenancies() if one.id != claim.tenant.id]
        if (chosen := victims(others, after)) is None:
            return "no"
        self._evict(chosen)
        return "soon"

    async def _settled(self, waiting: _Waiting) -> None:
        """Looks again when nothing happens, too: patience runs out by itself."""
        while not waiting.granted.done():
            await asyncio.wait({waiting.granted}, timeout=PATIENCE_S / 4)
            self.look()

    def yields(self, id: str) -> bool:
        """Whether this tenant takes no new requests, since another waits for its room."""
        return id in self._yielding

    async def moved(self) -> None:
        """Returns when who has to yield has changed, or when room was given back."""
        await self._moved.wait()

    def released(self, claim: Claim) -> None:
        with contextlib.suppress(ValueError):
            self._claims.remove(claim)
        self.look()
        self._wake()

    def measured(self, claim: Claim, used: Mapping[str, int]) -> None:
        """What a tenant really holds. Where that passes the budget, idle ones go."""
        claim.used = {device: max(amount, claim.used.get(device, 0)) for device, amount in used.items()}
        self._shrink()

    def look(self) -> None:
        """Let in whom there is room for, and make room for the next. Called whenever something changed."""
        self._drop_settled()
        while self._queue and self._serve(self._queue[0]):
            self._queue.pop(0)
            self._drop_settled()
        if not self._queue:
            self._ask_to_yield(frozenset())

    # -- deciding ---------------------------------------------------------------------------------

    def _refuse_what_never_fits(self, tenant: Tenant, need: Bytes) -> None:
        for device, amount in missing_bytes(self.budgets, (), need).items():
            if amount > 0:
                have = self.budgets[device]
                text = f"{tenant.id} needs about {need[device] / 1e6:,.0f} MB of {device}; the budget is "
                raise NoRoom(f"{text}{have / 1e6:,.0f} MB", never=True)

    def _drop_settled(self) -> None:
        self._queue = [waiting for waiting in self._queue if not waiting.granted.done()]

    def _serve(self, waiting: _Waiting) -> bool:
        """True where it is settled: granted or refused."""
        missing = missing_bytes(self.budgets, (claim.bytes for claim in self._claims), waiting.need)
        if all(amount <= 0 for amount in missing.values()):
            claim = Claim(self, waiting.tenant, waiting.need, waiting.reload_s)
            self._claims.append(claim)
            self._ask_to_yield(frozenset())
            waiting.granted.set_result(claim)
            return True
        staying = [claim.bytes for claim in self._claims if not claim.leaving]
        after = missing_bytes(self.budgets, staying, waiting.need)
        if all(amount <= 0 for amount in after.values()):
            return False  # those who leave give enough
        chosen = victims(self._tenancies(), after)
        if chosen is not None:
            self._evict(chosen)
            return False
        if not waiting.patient:
            waiting.granted.set_exception(_crowded(waiting.tenant))
            return True
        if time.monotonic() - waiting.since >= PATIENCE_S:
            self._ask_to_yield(frozenset(victims(self._tenancies(), after, busy_too=True) or ()))
        return False

    def _tenancies(self) -> list[Tenancy]:
        return [
            Tenancy(
                id=claim.tenant.id,
                bytes=claim.bytes,
                busy=claim.tenant.busy,
                idle_s=claim.tenant.idle_s,
                reload_s=claim.reload_s,
            )
            for claim in self._claims
            if not claim.leaving
        ]

    def _evict(self, ids: tuple[str, ...]) -> None:
        for claim in self._claims:
            if claim.tenant.id in ids and not claim.leaving:
                claim.leaving = True
                self.evictions[claim.tenant.id] = self.evictions.get(claim.tenant.id, 0) + 1
                log.info("%s is unloaded to make room", claim.tenant.id)
                claim.tenant.evict()

    def _shrink(self) -> None:
        held = [claim.bytes for claim in self._claims if not claim.leaving]
        over = missing_bytes(self.budgets, held, dict.fromkeys(self.budgets, 0))
        if any(amount > 0 for amount in over.values()):
            idle = [one for one in self._tenancies() if not one.busy]
            self._evict(victims(idle, over) or tuple(one.id for one in idle))

    def _ask_to_yield(self, ids: frozenset[str]) -> None:
        if ids != self._yielding:
            self._yielding = set(ids)
            self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()


def _crowded(tenant: Tenant) -> NoRoom:
    return NoRoom(f"{tenant.id} needs memory that other models are using")
