"""What `serve` shows while the models that are to be ready at the start are built and loaded."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from server.cli.terminal import Progress, Step, progress

if TYPE_CHECKING:
    from server.pool.states import ModelState
    from server.settings import Settings

EVERY_S = 0.2


class Loading:
    def __init__(self, settings: "Settings") -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{settings.port}/v1"

    async def follow(self, states: "Callable[[], Sequence[ModelState]]") -> None:
        """Shows preloaded models until each is ready or has failed."""
        with progress() as shown:
            ended: set[str] = set()
            while waiting := [one for one in states() if one.model.preload and one.model.id not in ended]:
                ended.update(one.model.id for one in waiting if self._ended(one, shown))
                await asyncio.sleep(EVERY_S)

    def _ended(self, state: "ModelState", shown: Progress) -> bool:
        match state.state:
            case "ready":
                shown.say(f"{state.variant} is ready at {self.url}")
            case "failed" | "quarantined":
                shown.say(f"{state.variant} failed: {state.error}")
            case "building" | "loading":
                shown.show(state.variant, step_of(state))
                return False
            case "unloaded":  # its turn will come
                return False
        return True


def step_of(state: "ModelState") -> Step:
    """A build's own stage, else the state itself."""
    if state.progress is None:
        return Step(state.state, 0, 0, "")
    return Step(state.progress.stage, state.progress.done, state.progress.total, state.progress.unit)
