"""Whom to unload: never who is busy, always enough, never one too many, and the cheapest; with figures."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.pool import policy
from server.pool.policy import Tenancy, missing_bytes, price, victims

DEVICES = ("ram", "cuda:0")


@st.composite
def tenancies(draw: st.DrawFn, most: int = 9) -> list[Tenancy]:
    amounts = st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 100), max_size=2)
    return [
        Tenancy(
            id=str(number),
            bytes=draw(amounts),
            busy=draw(st.booleans()),
            idle_s=draw(st.floats(0, 1e5)),
            reload_s=draw(st.floats(0.01, 100)),
        )
        for number in range(draw(st.integers(0, most)))
    ]


MISSING = st.dictionaries(st.sampled_from(DEVICES), st.integers(-50, 250), max_size=2)


def gives(chosen: list[Tenancy], missing: dict[str, int]) -> bool:
    return all(
        sum(one.bytes.get(d, 0) for one in chosen) >= amount for d, amount in missing.items() if amount > 0
    )


@given(tenancies(), MISSING, st.booleans())
def test_enough_no_more_and_nobody_busy(held: list[Tenancy], missing: dict[str, int], busy_too: bool) -> None:
    chosen = victims(held, missing, busy_too=busy_too)
    able = [one for one in held if busy_too or not one.busy]
    if chosen is None:
        assert not gives(able, missing)
        return
    gone = [one for one in held if one.id in chosen]
    assert len(gone) == len(chosen)
    assert all(one in able for one in gone)
    assert gives(gone, missing)
    for one in gone:
        assert not gives([other for other in gone if other is not one], missing)


@given(tenancies(most=6), MISSING)
def test_no_other_choice_is_cheaper(held: list[Tenancy], missing: dict[str, int]) -> None:
    chosen = victims(held, missing)
    if chosen is None:
        return
    cost = sum(price(one) for one in held if one.id in chosen)
    idle = [one for one in held if not one.busy]
    for size in range(len(idle) + 1):
        for others in combinations(idle, size):
            if gives(list(others), missing):
                assert cost <= sum(map(price, others)) + 1e-9


@given(tenancies(most=40), st.integers(1, 2000))
def test_many_engines_are_weighed_soon(held: list[Tenancy], amount: int) -> None:
    chosen = victims(held, {"ram": amount})
    idle = sum(one.bytes.get("ram", 0) for one in held if not one.busy)
    assert (chosen is None) == (idle < amount)


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [
        (dict(reload_s=9.0), dict(reload_s=1.0), "b"),  # what is soon there again goes
        (dict(reload_s=9.0, idle_s=600.0), dict(reload_s=1.0), "a"),  # but not if nobody asked for the other
        (dict(reload_s=1.0, busy=True), dict(reload_s=9.0), "b"),
    ],
)
def test_the_price_is_the_time_to_load_again(
    first: dict[str, float], second: dict[str, float], gone: str
) -> None:
    held = [
        Tenancy(**{"id": id, "bytes": {"ram": 100}, "busy": False, "idle_s": 1.0, **fields})  # type: ignore[arg-type]
        for id, fields in (("a", first), ("b", second))
    ]
    assert victims(held, {"ram": 60}) == (gone,)


@given(st.dictionaries(st.sampled_from(DEVICES), st.integers(1, 500)), st.lists(MISSING, max_size=4))
def test_what_is_missing_is_what_passes_the_budget(
    budgets: dict[str, int], held: list[dict[str, int]]
) -> None:
    need = {"ram": 40, "cuda:1": 7}
    missing = missing_bytes(budgets, held, need)
    assert set(missing) == set(budgets) & set(need)
    for device, amount in missing.items():
        assert sum(one.get(device, 0) for one in held) + need[device] == budgets[device] + amount


def test_an_idle_engine_is_worth_half_as_much_each_minute() -> None:
    one = Tenancy(id="a", bytes={}, busy=False, idle_s=policy.HALF_LIFE_S, reload_s=8.0)
    assert price(one) == 4.0
