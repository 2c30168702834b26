"""Turns: never more than the width, by priority, and none is lost, whoever is cancelled."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.pool.lanes import Lane


async def order(priorities: Sequence[int], width: int = 1) -> list[int]:
    """Numbers of the visitors as their turns came; all but the first `width` had to wait."""
    lane, came, go = Lane(width), [], asyncio.Event()

    async def visit(number: int) -> None:
        async with lane.turn(str(number), priorities[number]):
            came.append(number)
            await go.wait()

    visitors = []
    for number in range(len(priorities)):
        visitors.append(asyncio.create_task(visit(number)))
        await asyncio.sleep(0)
    assert came == list(range(min(width, len(priorities))))
    go.set()
    await asyncio.gather(*visitors)
    return came


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_turns_come_by_priority_then_by_arrival(priorities: list[int]) -> None:
    first, *rest = asyncio.run(order(priorities))
    assert first == 0
    assert rest == sorted(rest, key=lambda number: (priorities[number], number))


@given(
    width=st.integers(1, 3),
    cancels=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 6)), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_cancelling_anybody_at_any_time_loses_no_turn(width: int, cancels: list[tuple[int, int]]) -> None:
    async def scenario() -> None:
        lane, inside, most = Lane(width), 0, 0

        async def visit(number: int) -> None:
            nonlocal inside, most
            async with lane.turn(str(number), 0):
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0)
                finally:
                    inside -= 1

        visitors = [asyncio.create_task(visit(number)) for number in range(8)]
        for number, ticks in cancels:
            for _ in range(ticks):
                await asyncio.sleep(0)
            visitors[number].cancel()
        await asyncio.wait(visitors)
        assert most <= width
        async with asyncio.timeout(1):  # every turn is free again
            await asyncio.gather(*(asyncio.create_task(visit(number)) for number in range(8, 12)))

    asyncio.run(scenario())


@pytest.mark.parametrize(("hurried", "expected"), [(3, [0, 3, 1, 2]), (0, [0, 1, 2, 3])])
async def test_who_waits_can_be_moved_forward(hurried: int, expected: list[int]) -> None:
    lane, came, go = Lane(1), [], asyncio.Event()

    async def visit(number: int) -> None:
        async with lane.turn(str(number), 0):
            came.append(number)
            await go.wait()

    visitors = [asyncio.create_task(visit(number)) for number in range(4)]
    await asyncio.sleep(0)
    lane.hurry(str(hurried), -5)
    lane.hurry("2", 9)  # never back
    go.set()
    await asyncio.gather(*visitors)
    assert came == expected
