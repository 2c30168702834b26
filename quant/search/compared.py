"""What weight-compression toolkits would have guessed, beside what a search has measured. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from quant.search.evidence import Evidence
from quant.search.space import ERRORS, Group

RATIO = 0.5  # of the groups' weights that go to fewer bits
Guesses = Mapping[str, Mapping[str, float]]  # by group and metric


class Compared(Struct, frozen=True, kw_only=True):
    """One metric against the measured costs of the same groups, for each weight."""

    metric: str
    rank_correlation: float  # Spearman's: 1 where it orders groups as the measurement does, 0 by chance
    in_common: float  # share by weights: least sensitive groups by the metric among those by measurement
    ratio: float  # of all weights that are called the least sensitive


def lowest(sensitivities: Mapping[str, float], weights: Mapping[str, int], ratio: float) -> frozenset[str]:
    """The layers for 4 bits: the least sensitive, up to a `ratio` (toolkits' word) of all weights."""
    room = ratio * sum(weights.values())
    found = set()
    for name in sorted(sensitivities, key=lambda one: (sensitivities[one], one)):
        room -= weights[name]
        if room < -1e-9:
            break
        found.add(name)
    return frozenset(found)


def compared(guesses: Guesses, evidence: Evidence, groups: Sequence[Group]) -> tuple[Compared, ...]:
    """By what groups cost for each weight. Empty where fewer than three groups are known both ways."""
    weights = {group.name: group.weights for group in groups if group.name in guesses}
    costs = {
        group: probe.kl.value / ERRORS[probe.types[group]] / weights[group]  # as if all had one type
        for probe in evidence.probes
        if (group := probe.alone) and group in weights
    }
    if len(costs) < 3:
        return ()
    weights = {name: weights[name] for name in costs}
    names, measured = list(weights), lowest({name: costs[name] for name in weights}, weights, RATIO)
    found = []
    for metric in guesses[names[0]]:
        guessed = {name: guesses[name][metric] for name in names}
        common = lowest(guessed, weights, RATIO) & measured
        found.append(
            Compared(
                metric=metric,
                rank_correlation=_rank_correlation(list(guessed.values()), [costs[one] for one in names]),
                in_common=round(_sum(common, weights) / max(_sum(measured, weights), 1), 3),
                ratio=RATIO,
            )
        )
    return tuple(found)


def _sum(names: Iterable[str], weights: Mapping[str, int]) -> int:
    return sum(weights[name] for name in names)


def _rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of equal values the first is the lower."""
    pairs = list(zip(_ranks(ours), _ranks(theirs), strict=True))
    off, n = sum((a - b) ** 2 for a, b in pairs), len(pairs)
    return round(1 - 6 * off / (n * (n**2 - 1)), 3)


def _ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=lambda at: (values[at], at))
    places = dict(zip(order, range(len(order)), strict=True))
    return [places[at] for at in range(len(values))]
