"""How far a long piece of work is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal[
    "pull",
    "convert",
    "check",
    "calibrate",
    "imatrix",
    "quantize",
    "assemble",
    "publish",
    "search",
    "reference",
    "measure",
    "answers",
    "perplexity",
    "speed",
    "blocks",
]


@dataclass(frozen=True, slots=True)
class Progress:
    stage: Stage
    done: int
    total: int
    unit: str
    detail: "Detail | None" = None  # of what was just done


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One linear that was quantized, one block that was finished, or a word to the user."""

    module: str | None = None
    method: str | None = None
    loss: float | None = None  # mean squared error of the module's output
    rtn_loss: float | None = None  # the same for round-to-nearest
    damping: float | None = None
    fallback: str | None = None  # why the recipe's method was not used
    tokens: int | None = None  # that were sent to the expert whose module it is
    bytes: int | None = None  # of the finished block in the file
    memory_bytes: int | None = None  # most that was held so far, of the GPU's memory or else the machine's
    eta_s: float | None = None  # seconds until the last block is done
    note: str | None = None


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """For callers who do not watch."""
