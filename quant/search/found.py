"""A search's answer: the winner, why it won, and everything that was tried."""

from collections.abc import Iterator
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import asdict

from quant.measure.measurement import Figure
from quant.search.compared import Compared, Guesses, compared
from quant.search.evidence import Evidence, Probe, Try
from quant.search.space import Space
from quant.search.target import Target

NO_GUESSES: Guesses = MappingProxyType({})


class Tried(Try, frozen=True, kw_only=True):
    meets: bool


class Alone(Struct, frozen=True, kw_only=True):
    """What a group of weights costs when it alone is quantized."""

    group: str
    type: str
    kl: Figure
    guesses: dict[str, float] = {}  # by metric: what toolkits take for its sensitivity (quant.search.metrics)


class Found(Struct, frozen=True, kw_only=True):
    target: Target
    winner: Try | None
    why: str
    tries: tuple[Tried, ...]  # built and measured, from large to small
    probed: tuple[Probe, ...]  # mixtures that were scored on the search's texts only
    sensitivities: tuple[Alone, ...]  # from the most to the least sensitive
    space: str  # what was searched, in words
    compared: tuple[Compared, ...] = ()  # toolkits' guesses against the measured sensitivities


def found_of(
    target: Target,
    winner: Try | None,
    why: str,
    evidence: Evidence,
    space: Space,
    guesses: Guesses = NO_GUESSES,
) -> Found:
    tries = sorted(evidence.tries, key=lambda one: (-one.bytes, one.variant))
    return Found(
        target=target,
        winner=winner,
        why=why,
        tries=tuple(Tried(meets=target.met_by(one), **asdict(one)) for one in tries),
        probed=evidence.mixtures,
        sensitivities=tuple(sorted(_alone(evidence, guesses), key=lambda one: -one.kl.value)),
        space=space.words,
        compared=compared(guesses, evidence, space.groups),
    )


def _alone(evidence: Evidence, guesses: Guesses) -> Iterator[Alone]:
    for probe in evidence.probes:
        if group := probe.alone:
            guessed = dict(guesses.get(group, {}))
            yield Alone(group=group, type=probe.types[group], kl=probe.kl, guesses=guessed)


def lines_of(found: Found) -> Iterator[str]:
    """For a terminal."""
    head = ("variant", "from", "bytes", "bits/w", "mean KL", "top-1", "meets")
    rows = [head, *(_row(one) for one in found.tries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"{len(found.sensitivities)} groups alone, {len(found.probed)} mixtures probed"
    if found.compared:
        yield (
            "toolkits' guesses beside what groups cost a weight as measured: rank correlation, and how much "
            f"of the {found.compared[0].ratio:.0%} of weights that are called the least sensitive both name"
        )
    for one in found.compared:
        yield f"  {one.metric}  {one.rank_correlation:+.2f}  {one.in_common:.0%}"
    yield f"searched: {found.space}"
    yield found.why


def _row(one: Tried) -> tuple[str, ...]:
    return (
        one.variant,
        one.stage,
        f"{one.bytes:,}",
        f"{one.bits_per_weight:.2f}",
        str(one.kl),
        one.top1.percent,
        "yes" if one.meets else "rejected" if one.rejected else "no",
    )
