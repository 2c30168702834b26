"""Pure decisions about engines: whether to try again and when, whether to refuse, when to unload, and whom to
unload for another.

Times are seconds of a monotonic clock.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

DEATHS = 3  # so many within
WINDOW_S = 60.0  # quarantine a variant
QUARANTINE_S = 600.0  # and so long after the last death it may be tried again
LONGEST_RESTART_S = 30.0
LONGEST_RETRY_S = 300.0
LOADING_RETRY_S = 5  # what a client that has waited in vain is told
BUILDING_RETRY_S = 15
CROWDED_RETRY_S = 60  # for an engine that is larger than the budget

# A build that failed for one of these fails again until somebody changes the source or the recipe.
LASTING = frozenset({"bad_recipe", "variant_rejected", "unsupported_architecture", "tokenizer_mismatch"})


@dataclass(frozen=True, slots=True)
class History:
    """What went wrong with one variant."""

    deaths: tuple[float, ...] = ()  # the last few, oldest first
    failures: int = 0  # loads that failed since the last that did not
    failed_at: float = 0.0
    reason: str = ""  # of the last failure or death


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str
    retry_s: float
    quarantined: bool


def after_death(history: History, now: float, reason: str) -> History:
    return replace(history, deaths=(*history.deaths, now)[-DEATHS:], reason=reason)


def after_failure(history: History, now: float, reason: str) -> History:
    return replace(history, failures=history.failures + 1, failed_at=now, reason=reason)


def after_success(history: History) -> History:
    """Deaths are kept: an engine that starts well and dies of every request is in quarantine soon."""
    return replace(history, failures=0, reason="")


def refusal(history: History, now: float) -> Refusal | None:
    """Why a request must not start another load now, or None."""
    if (until := _quarantined_until(history)) > now:
        return Refusal(
            f"its engine died {DEATHS} times within {WINDOW_S:.0f} s, at last: {history.reason}",
            until - now,
            quarantined=True,
        )
    until = history.failed_at + retry_delay_s(history.failures)
    if history.failures and until > now:
        return Refusal(history.reason, until - now, quarantined=False)
    return None


def _quarantined_until(history: History) -> float:
    if len(history.deaths) < DEATHS or history.deaths[-1] - history.deaths[-DEATHS] > WINDOW_S:
        return -math.inf
    return history.deaths[-1] + QUARANTINE_S


def retry_delay_s(failures: int) -> float:
    """After a load that failed: 1, 2, 4, ... seconds."""
    return min(2.0 ** min(failures - 1, 30), LONGEST_RETRY_S) if failures else 0.0


def restart_delay_s(history: History, now: float) -> float:
    """After a death: none at first, then 1, 2, 4, ... seconds for each further one of the last minute."""
    recent = sum(now - death <= WINDOW_S for death in history.deaths)
    return min(2.0 ** (recent - 2), LONGEST_RESTART_S) if recent > 1 else 0.0


def unload_in_s(*, users: int, idle_since: float, keep_alive: float | None, now: float) -> float | None:
    """How long until an engine is to be unloaded; None while somebody uses it, or for ever."""
    if users or keep_alive is None:
        return None
    return max(0.0, idle_since + keep_alive - now)


# -- memory ---------------------------------------------------------------------------------------

Bytes = Mapping[str, int]  # by device: "ram", "cuda:0"
EXACT = 12  # so many engines are weighed in every combination, more of them one after the other
HALF_LIFE_S = 60.0  # of an idle engine's worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """One engine that holds memory."""

    id: str
    bytes: Bytes
    busy: bool  # a request uses it
    idle_s: float = 0.0
    reload_s: float = 1.0  # its bytes times what a byte took to load


def price(tenancy: Tenancy) -> float:
    """What it costs to let it go: the seconds to load it again, less likely the longer nobody asked."""
    return tenancy.reload_s * math.exp2(-min(tenancy.idle_s / HALF_LIFE_S, 100.0))


def victims(held: Sequence[Tenancy], missing: Bytes, *, busy_too: bool = False) -> tuple[str, ...] | None:
    """The cheapest engines whose end gives at least `missing`; None where there are none.

    None of them is busy, unless `busy_too` asks whom to let run out.
    """
    wanted = {device: amount for device, amount in missing.items() if amount > 0}
    able = sorted((one for one in held if busy_too or not one.busy), key=price)
    useful = [one for one in able if any(one.bytes.get(device, 0) > 0 for device in wanted)]
    if not wanted:
        return ()
    if not _gives(useful, wanted):
        return None
    chosen = _cheapest(useful, wanted) if len(useful) <= EXACT else _pruned(useful, wanted)
    return tuple(one.id for one in chosen)


def _gives(tenancies: Iterable[Tenancy], wanted: Bytes) -> bool:
    given = list(tenancies)
    return all(sum(one.bytes.get(device, 0) for one in given) >= amount for device, amount in wanted.items())


def _cheapest(useful: list[Tenancy], wanted: Bytes) -> tuple[Tenancy, ...]:
    sets = (
        chosen
        for size in range(1, len(useful) + 1)
        for chosen in combinations(useful, size)
        if _gives(chosen, wanted)
    )
    return min(sets, key=lambda chosen: (sum(map(price, chosen)), len(chosen)))


def _pruned(useful: list[Tenancy], wanted: Bytes) -> list[Tenancy]:
    """Cheap ones until it is enough; then without those that turn out to be needless, dearest first."""
    chosen: list[Tenancy] = []
    for one in useful:
        chosen.append(one)
        if _gives(chosen, wanted):
            break
    for one in reversed(list(chosen)):
        rest = [other for other in chosen if other is not one]
        if _gives(rest, wanted):
            chosen = rest
    return chosen


def missing_bytes(budgets: Bytes, held: Iterable[Bytes], need: Bytes) -> dict[str, int]:
    """By device, how much too little is free for `need`; 0 and less: it fits. No budget, no limit."""
    taken = list(held)
    return {
        device: need[device] + sum(one.get(device, 0) for one in taken) - budgets[device]
        for device in need
        if device in budgets
    }
