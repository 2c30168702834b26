"""Limits on how far a variant may be from its source, and what a measurement means under them. Pure.

A measurement that was cut short rejects only what is beyond a limit by more than two standard errors.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

from quant.measure.measurement import Measurement

State = Literal["unmeasured", "passed", "degraded", "rejected"]
# Mean KL divergence, in nats per token, below which so many bits are as good as they ought to be.
BANDS: Mapping[int, float] = {16: 0.002, 8: 0.002, 6: 0.006, 5: 0.015, 4: 0.075}
FEWEST_BITS = min(BANDS)  # fewer promise nothing, and are held to what these promise before they are good
METHOD_BITS: Mapping[str, int] = {"nf4": 4, "fp4": 4, "int8": 8, "smoothquant": 8, "copy": 16}
ROWS_WORSE = 3.0  # times as far as its matrix a row may be
STRANGERS = 5  # that are named
DOUBT = 2.0  # standard errors
MORE_LOOPS = 0.25  # share of greedy answers that repeat themselves, above the source's own


class Gate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """None: no such limit. The defaults let only what is broken or useless fall."""

    max_kl: float | None = 0.30  # mean, nats per token
    max_kl_p99: float | None = None
    min_top1: float | None = 0.70  # share of tokens
    max_ppl_ratio: float | None = None  # of the variant's perplexity to the source's, on the same text
    max_times_band: float | None = 10.0  # mean KL, as a multiple of what so many bits promise
    max_times_rounding: float | None = 2.0  # squared error of a matrix, over what its type rounds off
    serve_anyway: bool = False  # a rejected variant is served all the same; every answer says so


class Verdict(Struct, frozen=True):
    state: State
    reasons: tuple[str, ...] = ()  # why it is no better than that, each with its figure and limit

    def __str__(self) -> str:
        return self.state + (f": {'; '.join(self.reasons)}" if self.reasons else "")


def judge(measurement: Measurement | None, gate: Gate) -> Verdict:
    if measurement is None:
        return Verdict("unmeasured")
    if beyond := tuple(_beyond(measurement, gate)):
        return Verdict("rejected", beyond)
    if doubts := tuple(_doubts(measurement)):
        return Verdict("degraded", doubts)
    return Verdict("passed")


def _beyond(found: Measurement, gate: Gate) -> Iterator[str]:
    if not found.finite:
        yield "the model computes NaN or infinity"
        return
    if found.strange:
        yield f"not the source's: {', '.join(found.strange[:STRANGERS])}"
    yield from _not_the_sources(found, gate)
    doubt = 0.0 if found.complete else DOUBT
    ratio, band = found.ppl_ratio, _band(found) if (found.bits or 0) >= FEWEST_BITS else None
    times = None if band is None or gate.max_times_band is None else gate.max_times_band * band
    for figure, limit, name, label in (
        (found.kl.mean, gate.max_kl, "max_kl", "mean KL divergence"),
        (found.kl.mean, times, f"max_times_band: {found.bits} bits promise {band}", "mean KL divergence"),
        (found.kl.p99, gate.max_kl_p99, "max_kl_p99", "99th percentile of KL divergence"),
        (ratio, gate.max_ppl_ratio, "max_ppl_ratio", "perplexity ratio"),
    ):
        if limit is not None and figure.value - doubt * figure.error > limit:
            yield f"{label} {figure} exceeds {limit:g} ({name})"
    top1 = found.top1
    if gate.min_top1 is not None and top1.value + doubt * top1.error < gate.min_top1:
        yield f"top-1 agreement {top1.percent} is below {100 * gate.min_top1:g} % (min_top1)"


def _not_the_sources(found: Measurement, gate: Gate) -> Iterator[str]:
    """A matrix, or rows of one, that cannot be the source's, rounded."""
    limit = gate.max_times_rounding
    if found.rounding is None or limit is None:
        return
    for one in found.rounding.worst[:1]:
        if one.times > limit:
            yield (
                f"{one.name} is {one.error:.3g} of its length from the source's, where rounding makes "
                f"{one.expected:.2g} (max_times_rounding)"
            )
        elif one.row_times > limit * ROWS_WORSE:
            yield (
                f"a row of {one.name} is {one.row_times**0.5:,.0f} times as far from the source's "
                "as rounding makes it (max_times_rounding)"
            )


def _doubts(found: Measurement) -> Iterator[str]:
    band = _band(found)
    if band is not None and found.kl.mean.value > band:
        bits = max(found.bits or 0, FEWEST_BITS)
        yield f"mean KL divergence {found.kl.mean} is outside the band of {bits} bits ({band:g})"
    health = found.health
    if health is not None and health.loops - health.source_loops > MORE_LOOPS:
        yield f"{health.loops:.0%} of greedy answers repeat themselves (source: {health.source_loops:.0%})"


def _band(found: Measurement) -> float | None:
    """What its bits promise, or the next fewer ones; None where nobody knows how many they are."""
    if found.bits is None:
        return None
    return BANDS[max((bits for bits in BANDS if bits <= found.bits), default=FEWEST_BITS)]


def nominal_bits(recipe: Mapping[str, Any], bits_per_weight: float) -> int | None:
    """Of a recipe's body: the bits its codes are named for, whatever else the file holds; of a mixture, which
    nobody has named, its mean."""
    match recipe:
        case {"overrides": [_, *_]}:
            return min(int(bits_per_weight), 16)
        case {"type": str(kind)}:
            digit = re.search(r"\d+", kind)
            return min(int(digit[0]), 16) if digit else None
        case {"scheme": {"bits": int(bits)}}:
            return bits
        case {"method": str(method)}:
            return METHOD_BITS.get(method)
    return None
