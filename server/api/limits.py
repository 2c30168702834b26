"""What one caller may ask for at once and in a minute. Counted for its key; without one, for its address."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth import Keys, is_admin_path
from server.errors import RateLimited
from server.settings import Settings

CALLERS = 10_000  # remembered at most; the one that asked last longest ago is forgotten first
BUSY_RETRY_S = 1


@dataclass(slots=True)
class Use:
    running: int = 0
    left: float = 0.0  # requests that may start now
    at: float = 0.0  # when `left` was true


class CallerLimits:
    """No clock of its own: `clock` gives seconds that only grow."""

    def __init__(
        self, concurrency: int | None, per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._concurrency = concurrency
        self._per_minute = per_minute
        self._clock = clock
        self._uses: OrderedDict[str, Use] = OrderedDict()

    @property
    def active(self) -> bool:
        return self._concurrency is not None or self._per_minute is not None

    @contextmanager
    def request(self, caller: str) -> Iterator[None]:
        """Around a whole request, its answer included. Raises RateLimited."""
        use = self._use(caller)
        if self._concurrency is not None and use.running >= self._concurrency:
            raise RateLimited(
                f"at most {self._concurrency} requests of one key run at once", retry_after=BUSY_RETRY_S
            )
        self._spend(use)
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1

    def _use(self, caller: str) -> Use:
        use = self._uses.get(caller)
        if use is None:
            use = self._uses[caller] = Use(left=float(self._per_minute or 0), at=self._clock())
            self._forget()
        self._uses.move_to_end(caller)
        return use

    def _forget(self) -> None:
        if len(self._uses) > CALLERS:
            stale = next((name for name, use in self._uses.items() if not use.running), None)
            if stale is not None:
                del self._uses[stale]

    def _spend(self, use: Use) -> None:
        """One of the minute's requests; they come back evenly, and up to a minute's worth is saved up."""
        if self._per_minute is None:
            return
        now, each_s = self._clock(), 60 / self._per_minute
        use.left = min(float(self._per_minute), use.left + (now - use.at) / each_s)
        use.at = now
        if use.left < 1:
            raise RateLimited(
                f"at most {self._per_minute} requests a minute with one key",
                retry_after=math.ceil((1 - use.left) * each_s),
            )
        use.left -= 1


class Limited:
    """Plain ASGI, inside Edge: only POSTs that ask a model for something count."""

    def __init__(self, app: ASGIApp, keys: Keys, settings: Settings) -> None:
        self.app = app
        self.keys = keys
        self.limits = CallerLimits(settings.key_concurrency, settings.key_rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = self.limits.active and scope["type"] == "http" and scope["method"] == "POST"
        if not counts or is_admin_path(scope["path"]):
            await self.app(scope, receive, send)
            return
        with self.limits.request(self._caller(scope)):
            await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> str:
        """Raises Unauthorized. Where no key is asked for, any that is given proves nothing."""
        caller = self.keys.caller(scope)
        if caller.known:
            return caller.salt
        return str(scope["client"][0]) if scope["client"] else ""
