"""What the pool lends and what it tells about itself."""

from dataclasses import dataclass
from typing import Literal

from server.catalog import Model
from server.pool.records import Progress
from server.pool.uses import NONE, Use
from server.process.client import EngineClient
from server.text.model import Origin, TextModel
from server.types import Status

LoadState = Literal["unloaded", "building", "loading", "ready", "failed", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The variant that answers."""

    id: str  # "tiny-chat:q4_k_m"
    model: str
    recipe: str  # its name; of a GGUF source, its file type
    key: str  # of the variant; of a GGUF source, the source's digest
    format: str
    backend: str
    label: str = "unmeasured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """An engine that is not unloaded while this is held. It may die all the same."""

    model: Model
    variant: Served
    engine: EngineClient
    text: TextModel
    uses: frozenset[Use] = NONE  # that there is memory for


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """One model of the catalog, by its default variant."""

    model: Model
    variant: str  # id
    state: LoadState
    job: str | None = None  # that builds it
    progress: Progress | None = None  # of the build or the load
    error: str | None = None
    status: Status | None = None  # where it is loaded
    served: Served | None = None  # where it is loaded
    template: Origin | None = None  # whose chat template it has, where it is loaded
    variants: tuple[str, ...] = ()  # ids of all that are built
    rests: bool = False  # unloaded on purpose (idle, or for another); the next request loads it


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """One engine that is loaded, of any variant."""

    served: Served
    status: Status
    users: int
    restarts: int
    pid: int
