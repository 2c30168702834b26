"""Pure decisions about engines: whether to try again and when, whether to refuse, and when to unload.

Times are seconds of a monotonic clock.
"""

import math
from dataclasses import dataclass, replace

DEATHS = 3  # so many within
WINDOW_S = 60.0  # quarantine a variant
QUARANTINE_S = 600.0  # and so long after the last death it may be tried again
LONGEST_RESTART_S = 30.0
LONGEST_RETRY_S = 300.0
LOADING_RETRY_S = 5  # what a client that has waited in vain is told
BUILDING_RETRY_S = 15

# A build that failed for one of these fails again until somebody changes the source or the recipe.
LASTING = frozenset({"bad_recipe", "unsupported_architecture", "tokenizer_mismatch"})


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
            f"its engine died {DEATHS} times within {WINDOW_S:.0f} s, at last it {history.reason}",
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
