"""Allocations against every possible one."""

import itertools
import random

import pytest

from quant.search.allocate import Choice, best, hull, smallest

Groups = dict[str, list[Choice]]


def groups(seed: int, count: int = 4) -> Groups:
    dice = random.Random(seed)
    found = {}
    for number in range(count):
        size, minds = dice.randint(50, 500), 10 ** dice.uniform(-3, 0)
        found[f"g{number}"] = [
            Choice(str(bits), size * bits, minds * 4.0**-bits * dice.uniform(0.5, 2))
            for bits in (8, 6, 5, 4, 3)
        ]
    return found


def total(found: dict[str, str], of: Groups) -> tuple[int, float]:
    taken = [choice for name, line in of.items() for choice in line if choice.kind == found[name]]
    return sum(one.bytes for one in taken), sum(one.loss for one in taken)


def everything(of: Groups) -> list[tuple[int, float]]:
    rows = itertools.product(*of.values())
    return [(sum(c.bytes for c in row), sum(c.loss for c in row)) for row in rows]


@pytest.mark.parametrize("seed", range(12))
def test_it_is_near_the_best_of_all(seed: int) -> None:
    of = groups(seed)
    every = everything(of)
    largest = max(size for size, _ in every)
    for limit in sorted(loss for _, loss in every)[:: len(every) // 7]:
        size, loss = total(smallest(of, limit), of)
        assert loss <= limit * (1 + 1e-9) or smallest(of, limit) == smallest(of, 0.0)
        if loss <= limit:
            assert size <= min(s for s, one in every if one <= limit) + 0.15 * largest
    for most in sorted(size for size, _ in every)[:: len(every) // 7]:
        found = best(of, most)
        assert found is not None
        size, loss = total(found, of)
        assert size <= most
        smaller = [one for s, one in every if s <= most - 0.15 * largest]
        assert not smaller or loss <= min(smaller) * (1 + 1e-9)


def test_what_cannot_fit_is_none_and_what_cannot_be_near_is_the_nearest() -> None:
    of = groups(1)
    assert best(of, 10) is None
    assert set(smallest(of, 0.0).values()) <= {"8", "6"}  # "6" where it happens to lose less


def test_a_hull_leaves_out_what_others_beat() -> None:
    line = [Choice("a", 100, 0.0), Choice("b", 90, 0.5), Choice("c", 80, 0.1), Choice("d", 80, 0.2)]
    assert [one.kind for one in hull([*line, Choice("e", 70, 0.1)])] == ["a", "e"]
    assert [one.kind for one in hull(line)] == ["a", "c"]
