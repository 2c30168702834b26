"""When to restart, when to refuse, when to unload: pure numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.pool import policy
from server.pool.policy import History


def died(*times: float) -> History:
    history = History()
    for moment in times:
        history = policy.after_death(history, moment, "was killed")
    return history


def test_the_first_restart_is_immediate_and_the_next_ones_wait_longer() -> None:
    assert policy.restart_delay_s(History(), 0) == 0
    assert policy.restart_delay_s(died(10), 10) == 0
    assert policy.restart_delay_s(died(10, 40), 40) == 1
    assert policy.restart_delay_s(died(10, 69, 70), 70) == 2


def test_a_death_long_ago_does_not_delay() -> None:
    assert policy.restart_delay_s(died(10, 10 + policy.WINDOW_S + 1), 10 + policy.WINDOW_S + 1) == 0


@pytest.mark.parametrize(
    ("deaths", "quarantined"), [((0, 1), False), ((0, 30, 60), True), ((0, 30, 60.1), False)]
)
def test_three_deaths_within_a_minute_are_quarantine(deaths: tuple[float, ...], quarantined: bool) -> None:
    refused = policy.refusal(died(*deaths), deaths[-1])
    assert (refused is not None) == quarantined
    if refused is not None:
        assert refused.quarantined
        assert refused.retry_s == policy.QUARANTINE_S
        assert refused.reason == f"its engine died 3 times within 60 s, at last: {died(*deaths).reason}"
        assert "was killed" in refused.reason


def test_quarantine_ends_and_one_more_death_does_not_bring_it_back() -> None:
    history = died(0, 1, 2)
    assert policy.refusal(history, 2 + policy.QUARANTINE_S - 1) is not None
    late = 2 + policy.QUARANTINE_S + 1
    assert policy.refusal(history, late) is None
    assert policy.refusal(policy.after_death(history, late, "x"), late) is None


def test_starting_well_does_not_wash_deaths_away() -> None:
    history = History()
    for moment in (0, 1, 2):
        history = policy.after_success(policy.after_death(history, moment, "x"))
    assert policy.refusal(history, 2) is not None


def test_failed_loads_are_tried_again_after_a_growing_pause() -> None:
    history, now, pauses = History(), 100.0, []
    for _ in range(12):
        history = policy.after_failure(history, now, "no room")
        refused = policy.refusal(history, now)
        assert refused is not None
        assert not refused.quarantined
        assert refused.reason == "no room"
        pauses.append(refused.retry_s)
        now += refused.retry_s
        assert policy.refusal(history, now) is None
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == policy.LONGEST_RETRY_S
    assert policy.refusal(policy.after_success(history), now) is None


@given(st.integers(0, 10**6))
def test_pauses_are_bounded_for_any_number_of_failures(failures: int) -> None:
    assert 0 <= policy.retry_delay_s(failures) <= policy.LONGEST_RETRY_S


@given(
    users=st.integers(0, 3),
    idle_for=st.floats(0, 1e6),
    keep_alive=st.none() | st.floats(0, 1e5),
)
def test_only_an_idle_engine_with_a_limit_is_unloaded(
    users: int, idle_for: float, keep_alive: float | None
) -> None:
    delay = policy.unload_in_s(users=users, idle_since=50.0, keep_alive=keep_alive, now=50.0 + idle_for)
    if users or keep_alive is None:
        assert delay is None
    else:
        assert delay == pytest.approx(max(0.0, keep_alive - idle_for), abs=1e-6)
