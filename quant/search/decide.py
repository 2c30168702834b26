"""What a search does next, from what it has found out so far. Pure: the same evidence, the same step.

1. Presets: the smallest that meets a divergence (by halves), or the largest that fits the bytes; then smaller
   ones, until two in a row are clearly beyond the target.
2. Each group alone: how much divergence it costs at one type, all others at 16 bits.
3. Mixtures: the allocation that the sensitivities promise, probed and corrected until the promise holds, then
   built and measured like every other variant. What is measured there corrects the next promise.
4. The winner is measured with all that a report shows; if it then misses the target, the next one is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quant.recipe import Recipe
from quant.search.allocate import Choice, best, smallest
from quant.search.evidence import Evidence, Probe, Try
from quant.search.space import ERRORS, Preset, Space
from quant.search.target import Target

BEYOND = 1.5  # times the limit: then smaller presets are not tried
CLOSE = 0.94  # of the limit: near enough
MARGIN, MORE_MARGIN = 0.98, 0.06  # of the limit that a mixture is made for; less for each that missed it
MOST_PROBES, MOST_MIXTURES = 10, 4
DOUBT = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class TryRecipe:
    """Build and measure it."""

    recipe: str | Recipe  # a preset's name, or a mixture
    stage: Literal["preset", "mixture"]


@dataclass(frozen=True, slots=True)
class ProbeTypes:
    types: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Confirm:
    """Measure this variant with all that a report shows."""

    key: str


@dataclass(frozen=True, slots=True)
class Stop:
    winner: Try | None
    why: str


Step = TryRecipe | ProbeTypes | Confirm | Stop


def next_step(target: Target, space: Space, evidence: Evidence) -> Step:
    return (
        _preset(target, space, evidence)
        or _alone(target, space, evidence)
        or _mixture(target, space, evidence)
        or _end(target, space, evidence)
    )


# -- presets --------------------------------------------------------------------------------------


def _preset(target: Target, space: Space, evidence: Evidence) -> Step | None:
    line = presets_in_reach(target, space, evidence)
    start = 0
    if target.max_kl is not None:
        meets, misses = _border(target, line, evidence)
        if misses - meets > 1:
            return TryRecipe(line[(meets + misses) // 2].name, "preset")
        start = misses
    return _downwards(target, line[start:], evidence)


def _border(target: Target, line: Sequence[Preset], evidence: Evidence) -> tuple[int, int]:
    """The smallest preset that is known to meet the divergence, and the largest below it that misses it."""
    tried = {number: found for number, one in enumerate(line) if (found := evidence.named(one.name))}
    meets = max((number for number, found in tried.items() if target.met_by(found)), default=-1)
    return meets, min((number for number in tried if number > meets), default=len(line))


def _downwards(target: Target, line: Sequence[Preset], evidence: Evidence) -> Step | None:
    clear = 0
    for preset in line:
        found = evidence.named(preset.name)
        if found is None:
            return TryRecipe(preset.name, "preset")
        clear = clear + 1 if _clearly_beyond(target, evidence, found) else 0
        if clear == 2:
            break
    return None


def presets_in_reach(target: Target, space: Space, evidence: Evidence) -> list[Preset]:
    """From large to small; all of them where the divergence is limited."""
    most = byte_limit(target, space)
    if most is None:
        return list(space.presets)
    return [one for one in space.presets if one.bytes - _spare(target, space, evidence) <= most]


def byte_limit(target: Target, space: Space) -> int | None:
    """What is limited, in bytes: of a whole variant, or of its tensors."""
    if target.target_bpw is not None:
        return int(target.target_bpw * space.elements / 8)
    return target.max_bytes


def _limited(target: Target, space: Space, found: Try) -> int:
    """A variant's amount of that."""
    if target.target_bpw is not None:
        return int(found.bits_per_weight * space.elements / 8)
    return found.bytes


def _spare(target: Target, space: Space, evidence: Evidence) -> int:
    """What predictions have too much, by the presets that were built: texts count for no bits per weight."""
    found = [
        one.bytes - _limited(target, space, tried)
        for one in space.presets
        if (tried := evidence.named(one.name)) is not None
    ]
    return min(found, default=0)


def _clearly_beyond(target: Target, evidence: Evidence, found: Try) -> bool:
    if target.max_kl is not None:
        limit = target.max_kl
    else:
        fitting = [one.kl.value for one in evidence.tries if target.met_by(one)]
        limit = min(fitting, default=0.0)
    return found.kl.value - DOUBT * found.kl.error > BEYOND * limit


# -- groups alone ---------------------------------------------------------------------------------


def _alone(target: Target, space: Space, evidence: Evidence) -> Step | None:
    if not _worth_mixing(target, space, evidence):
        return None
    known = {probe.alone for probe in evidence.probes}
    kind = probe_type(target, space, evidence)
    for group in space.groups:
        if group.name not in known:
            return ProbeTypes({group.name: group.like(kind)})
    return None


def _worth_mixing(target: Target, space: Space, evidence: Evidence) -> bool:
    """Not where the smallest preset meets the target, or nothing can be small enough."""
    most = byte_limit(target, space)
    if most is not None:
        least = space.bytes({group.name: group.ladder[-1] for group in space.groups})
        return least - _spare(target, space, evidence) <= most
    smallest_preset = evidence.named(space.presets[-1].name)
    return smallest_preset is None or not target.met_by(smallest_preset)


def probe_type(target: Target, space: Space, evidence: Evidence) -> str:
    """The base type of the largest preset that misses the divergence, or that fits the bytes: mixtures will
    be made of it and its neighbours."""
    for preset in space.presets:
        found = evidence.named(preset.name)
        if preset.kind is None:
            continue
        if target.max_kl is None:
            if preset in presets_in_reach(target, space, evidence):
                return preset.kind
        elif found is not None and not target.met_by(found):
            return preset.kind
    return "q4_k"


# -- mixtures -------------------------------------------------------------------------------------


def choices(space: Space, evidence: Evidence) -> dict[str, list[Choice]]:
    """By group: its types with their bytes and the divergence that its sensitivity promises."""
    probes = {probe.alone: probe for probe in evidence.probes if probe.alone}
    found = {}
    for group in space.groups:
        probe = probes[group.name]
        at = ERRORS[probe.types[group.name]]
        loss = max(probe.kl.value, probe.kl.error, 1e-9)
        found[group.name] = [
            Choice(kind, group.sizes[kind], loss * ERRORS[kind] / at) for kind in group.ladder
        ]
    return found


def promised(space: Space, evidence: Evidence, types: Mapping[str, str]) -> float:
    table = choices(space, evidence)
    return sum(one.loss for name, line in table.items() for one in line if one.kind == types[name])


def _mixture(target: Target, space: Space, evidence: Evidence) -> Step | None:
    if not _worth_mixing(target, space, evidence):
        return None
    built = [one for one in evidence.tries if one.stage == "mixture"]
    if len(built) >= MOST_MIXTURES or any(_close(target, space, one) for one in built):
        return None
    if target.max_kl is None:
        return _within_bytes(target, space, evidence, built)
    return _within_loss(target.max_kl, space, evidence)


def _close(target: Target, space: Space, found: Try) -> bool:
    """Little could be gained by going nearer to the limit."""
    if not target.met_by(found):
        return False
    if target.max_kl is not None:
        return found.kl.value >= CLOSE * target.max_kl
    return True


def _within_bytes(target: Target, space: Space, evidence: Evidence, built: Sequence[Try]) -> Step | None:
    """Bytes are predicted; what a mixture that was built has too many is taken off."""
    limit = byte_limit(target, space)
    assert limit is not None
    over = sum(max(0, _limited(target, space, one) - limit) for one in built)
    types = best(choices(space, evidence), limit + _spare(target, space, evidence) - space.fixed - over)
    return None if types is None else _built_once(types, space, evidence)


def _within_loss(max_kl: float, space: Space, evidence: Evidence) -> Step | None:
    limit = search_limit(max_kl, space, evidence)
    types = smallest(choices(space, evidence), limit / correction(space, evidence))
    known = _probe_of(evidence, types)
    if known is None and len(evidence.mixtures) < MOST_PROBES:
        return ProbeTypes(types)
    close = known is not None and CLOSE * limit <= known.kl.value <= limit
    step = _built_once(types, space, evidence) if close else None
    return step or _best_probed(limit, space, evidence)


def search_limit(max_kl: float, space: Space, evidence: Evidence) -> float:
    """For a mixture's divergence on the search's texts, so that it has `max_kl` on those of measurements."""
    missed = sum(one.stage == "mixture" and one.kl.value > max_kl for one in evidence.tries)
    return (MARGIN - MORE_MARGIN * missed) * max_kl / carried_over(space, evidence)


def correction(space: Space, evidence: Evidence) -> float:
    """Of the promises: the last mixture's figure over what was promised of it."""
    if not evidence.mixtures:
        return 1.0
    last = evidence.mixtures[-1]
    return max(0.05, last.kl.value / promised(space, evidence, last.types))


def carried_over(space: Space, evidence: Evidence) -> float:
    """Mixtures' divergence on the texts of measurements over that on the search's own: the largest ratio."""
    pairs = [
        (found, probe)
        for probe in evidence.mixtures
        if (found := evidence.named(space.recipe(probe.types).name)) is not None
    ]
    ratios = [found.kl.value / max(probe.kl.value, 1e-9) for found, probe in pairs]
    return min(4.0, max(0.25, *ratios)) if ratios else 1.0


def _best_probed(limit: float, space: Space, evidence: Evidence) -> Step | None:
    """Probing has ended, or promises nothing new: the smallest probed one that should meet the target."""
    for probe in sorted(evidence.mixtures, key=lambda one: one.bytes):
        if probe.kl.value <= limit and (step := _built_once(probe.types, space, evidence)):
            return step
    return None


def _probe_of(evidence: Evidence, types: Mapping[str, str]) -> Probe | None:
    return next((one for one in evidence.mixtures if one.types == types), None)


def _built_once(types: Mapping[str, str], space: Space, evidence: Evidence) -> Step | None:
    recipe = space.recipe(types)
    return None if evidence.named(recipe.name) else TryRecipe(recipe, "mixture")


# -- the end --------------------------------------------------------------------------------------


def _end(target: Target, space: Space, evidence: Evidence) -> Step:
    meeting = sorted((one for one in evidence.tries if target.met_by(one)), key=target.rank)
    if not meeting:
        return Stop(None, _why_none(target, evidence))
    if not meeting[0].full:
        return Confirm(meeting[0].key)
    return Stop(meeting[0], _why(target, meeting) + _but_for(target, meeting[0], evidence))


def _but_for(target: Target, winner: Try | None, evidence: Evidence) -> str:
    """What would have won if it were not rejected."""
    barred = sorted((one for one in evidence.tries if one.rejected and target.has(one)), key=target.rank)
    if not barred or (winner is not None and target.rank(barred[0]) > target.rank(winner)):
        return ""
    return f"; {barred[0].variant} would be better, but the gate rejects it: {barred[0].rejected}"


def _why(target: Target, meeting: Sequence[Try]) -> str:
    winner, others = meeting[0], [one for one in meeting[1:] if one.stage != "mixture"]
    what = "has the fewest bytes" if target.max_kl is not None else "is nearest to the source"
    if not others:
        return f"{winner.variant} alone has {target.words}"
    said = f"of what has {target.words}, {winner.variant} {what}"
    next_best = others[0]
    if target.max_kl is not None:
        share = 1 - winner.bytes / next_best.bytes
        return f"{said}: {winner.bytes:,} bytes, {share:.1%} fewer than {next_best.variant}, the next"
    return f"{said}: mean KL divergence {winner.kl}; that of {next_best.variant}, the next, is {next_best.kl}"


def _why_none(target: Target, evidence: Evidence) -> str:
    if not evidence.tries:
        return f"nothing in the space of the search has {target.words}"
    key = (lambda one: one.kl.value) if target.max_kl is not None else (lambda one: float(one.bytes))
    nearest = min(evidence.tries, key=key)
    return (
        f"none of {len(evidence.tries)} tries has {target.words}; the nearest is {nearest.variant}: "
        f"{nearest.bytes:,} bytes, {nearest.bits_per_weight:.2f} bits a weight, "
        f"mean KL divergence {nearest.kl}{_but_for(target, None, evidence)}"
    )
