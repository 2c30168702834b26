"""model:auto, best, fastest and smallest: which variant answers, decided from measurements alone. Pure.

Only variants that are built and may be served are candidates, and of those what can be opened here and fits:
an engine that is loaded has its memory already. What was measured and stands within the gate goes before what
nobody has measured, and that before what is served against the gate, in every mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from quant.measure.gate import State

Mode = Literal["auto", "best", "fastest", "smallest"]
MODES: tuple[Mode, ...] = ("auto", "best", "fastest", "smallest")
STANDING: dict[State, int] = {"passed": 0, "degraded": 1, "unmeasured": 2, "rejected": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`memory` is what its engine needs, measured or, for lack of that, the bytes of its files."""

    name: str
    state: State
    barred: bool  # rejected, and not served anyway
    kl: float | None
    bytes: int
    memory: int
    speed: float | None  # answer tokens a second, eight requests together
    loaded: bool
    device: str  # that its backend needs: "cpu" runs everywhere
    problem: str = ""  # why nothing here can open it
    is_reference: bool = False  # the source in float32, made for measuring and asked for by nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    free_memory: int  # bytes
    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Chosen:
    name: str | None
    reasons: dict[str, str]  # a sentence for each candidate


def choose(mode: Mode, candidates: Sequence[Candidate], situation: Situation) -> Chosen:
    """Equal ones: the first by name, so that the choice does not waver."""
    reasons = {one.name: _obstacle(one, situation) for one in candidates}
    able = sorted((one for one in candidates if not reasons[one.name]), key=lambda one: one.name)
    order, said = ORDERS[mode]
    ranked = sorted(able, key=order)
    for one in ranked[1:]:
        reasons[one.name] = f"not chosen: {ranked[0].name} {said}"
    if ranked:
        reasons[ranked[0].name] = f"chosen: it {said} of {len(ranked)} that may be served and fit"
    return Chosen(ranked[0].name if ranked else None, reasons)


def _obstacle(one: Candidate, situation: Situation) -> str:
    """Why it cannot be chosen; "" where it can."""
    if one.barred:
        return "not chosen: the gate rejects it"
    if one.is_reference:
        return "not chosen: it is what the others are measured against"
    if one.problem:
        return f"not chosen: {one.problem}"
    if one.device != "cpu" and one.device not in situation.devices:
        return f"not chosen: it needs {one.device}, which this machine lacks"
    if not one.loaded and one.memory > situation.free_memory:
        return (
            f"not chosen: it needs {one.memory / 1e6:,.0f} MB of memory, "
            f"{situation.free_memory / 1e6:,.0f} MB are free"
        )
    return ""


FAR = float("inf")
Order = Callable[[Candidate], tuple[float, ...]]


def _trust(one: Candidate) -> float:
    """0 within the gate, more for what was not measured or is served against it."""
    return max(0.0, STANDING[one.state] - STANDING["degraded"])


def _kl(one: Candidate) -> float:
    return FAR if one.kl is None else one.kl


def _slowness(one: Candidate) -> float:
    return -one.speed if one.speed else 0.0


ORDERS: dict[Mode, tuple[Order, str]] = {
    "auto": (
        lambda one: (STANDING[one.state], _slowness(one), one.bytes),
        "is the fastest of the best standing at the gate",
    ),
    "best": (lambda one: (_trust(one), _kl(one), one.bytes), "has the smallest divergence from the source"),
    "fastest": (lambda one: (_trust(one), _slowness(one), _kl(one)), "answers with the most tokens a second"),
    "smallest": (lambda one: (_trust(one), one.bytes, _kl(one)), "is the smallest file"),
}
