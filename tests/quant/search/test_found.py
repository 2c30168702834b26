"""The answer: every try with its verdict, and lines for a terminal."""

import msgspec

from quant.search.decide import Stop
from quant.search.found import Found, found_of, lines_of
from quant.search.target import Target
from tests.quant.search.world import World


def test_every_try_is_told_with_its_figures_and_whether_it_meets() -> None:
    world, target = World(), Target(max_kl=0.02)
    stop, evidence = world.search(target)
    assert isinstance(stop, Stop)
    found = found_of(target, stop.winner, stop.why, evidence, world.space.words)
    again = msgspec.json.decode(msgspec.json.encode(found), type=Found)
    assert again == found
    assert len(found.tries) == len(evidence.tries)
    assert [one.bytes for one in found.tries] == sorted((one.bytes for one in found.tries), reverse=True)
    assert all(one.meets == (one.kl.value <= 0.02) for one in found.tries)
    assert len(found.sensitivities) == len(world.space.groups)
    lines = list(lines_of(found))
    assert lines[-1] == stop.why
    assert stop.winner is not None
    (row,) = (line for line in lines[:-1] if line.startswith(stop.winner.variant))
    assert f"{stop.winner.bytes:,}" in row
    assert row.endswith("yes")
