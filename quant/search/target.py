"""What a search is to find, and which of two answers is the better one. Pure."""

from collections.abc import Mapping
from math import isfinite
from typing import Literal

from msgspec import Struct

from quant.errors import BadRecipe
from quant.search.evidence import Try

FIELDS = ("max_kl", "max_bytes", "target_bpw")


class Target(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of them."""

    max_kl: float | None = None  # mean, nats a token: the smallest recipe is wanted
    max_bytes: int | None = None  # of the variant's files: the recipe nearest to the source is wanted
    target_bpw: float | None = None  # bits a weight at most, the same
    format: Literal["gguf", "compressed-tensors"] = "gguf"  # of the mixtures

    @property
    def words(self) -> str:
        if self.max_kl is not None:
            return f"a mean KL divergence of at most {self.max_kl:g} nats a token"
        if self.max_bytes is not None:
            return f"at most {self.max_bytes:,} bytes"
        return f"at most {self.target_bpw:g} bits a weight"

    def met_by(self, found: Try) -> bool:
        """What the gate rejects meets nothing: it would never be served."""
        return not found.rejected and self.has(found)

    def has(self, found: Try) -> bool:
        """Whether it is within the limit."""
        if self.max_kl is not None:
            return found.kl.value <= self.max_kl
        if self.max_bytes is not None:
            return found.bytes <= self.max_bytes
        assert self.target_bpw is not None
        return found.bits_per_weight <= self.target_bpw

    def rank(self, found: Try) -> tuple[float, float, str]:
        """Of those that meet it, the smallest is the best."""
        pair = (found.bytes, found.kl.value) if self.max_kl is not None else (found.kl.value, found.bytes)
        return (*pair, found.variant)


def parse_target(value: Mapping[str, object]) -> Target:
    """{"max_kl": 0.02} and the like. Raises BadRecipe."""
    limits = {name: number for name, number in value.items() if name != "format"}
    if len(limits) != 1 or next(iter(limits)) not in FIELDS:
        raise BadRecipe(f"a target is one of {', '.join(FIELDS)}, with a number")
    form = value.get("format", "gguf")
    if form not in ("gguf", "compressed-tensors"):
        raise BadRecipe("the format of a target is gguf or compressed-tensors")
    ((name, number),) = limits.items()
    if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number) or number <= 0:
        raise BadRecipe(f"{name} is a number above 0")
    if name == "max_kl":
        return Target(max_kl=float(number), format=form)
    if name == "target_bpw":
        return Target(target_bpw=float(number), format=form)
    if number != int(number):
        raise BadRecipe("max_bytes is a whole number")
    return Target(max_bytes=int(number), format=form)
