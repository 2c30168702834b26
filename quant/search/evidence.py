"""What a search has found out so far: recipes that were built and measured, and mixtures that were probed."""

from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from quant.measure.measurement import Figure


class Try(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A variant that was built and measured on the texts of every measurement (not those of the search)."""

    variant: str  # the recipe's name
    recipe: dict[str, Any]  # Recipe.spec
    stage: Literal["known", "preset", "mixture"]  # known: measured before the search
    key: str
    bytes: int
    bits_per_weight: float
    kl: Figure
    top1: Figure
    texts: int
    full: bool = False  # measured with all that a report shows
    rejected: str = ""  # why the gate would not let it be served


class Probe(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A GGUF file that was scored on the search's own texts and then removed."""

    types: dict[str, str]  # tensor type by group; one group: all others keep 16 bits
    bytes: int  # as predicted for the whole variant
    kl: Figure

    @property
    def alone(self) -> str | None:
        """The one group that was quantized."""
        return next(iter(self.types)) if len(self.types) == 1 else None


class Evidence(Struct, frozen=True):
    """In the order in which it was found."""

    tries: tuple[Try, ...] = ()
    probes: tuple[Probe, ...] = ()

    def with_try(self, found: Try) -> "Evidence":
        """A variant that is measured again keeps its place."""
        if any(one.key == found.key for one in self.tries):
            same = tuple(
                replace(found, stage=one.stage) if one.key == found.key else one for one in self.tries
            )
            return replace(self, tries=same)
        return replace(self, tries=(*self.tries, found))

    def with_probe(self, found: Probe) -> "Evidence":
        return replace(self, probes=(*self.probes, found))

    def named(self, variant: str) -> Try | None:
        return next((one for one in self.tries if one.variant == variant), None)

    @property
    def mixtures(self) -> tuple[Probe, ...]:
        return tuple(one for one in self.probes if one.alone is None)
