"""How far a long piece of work is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["pull", "convert", "check", "quantize", "publish"]


@dataclass(frozen=True, slots=True)
class Progress:
    stage: Stage
    done: int
    total: int
    unit: str


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """For callers who do not watch."""
