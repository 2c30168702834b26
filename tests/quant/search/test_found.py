"""The answer: every try with its verdict, and lines for a terminal."""

import msgspec

from quant.search.decide import Stop
from quant.search.found import Found, found_of, lines_of
from quant.search.space import ERRORS
from quant.search.target import Target
from tests.quant.search.world import World


def test_every_try_is_told_with_its_figures_and_whether_it_meets() -> None:
    world, target = World(), Target(max_kl=0.02)
    stop, evidence = world.search(target)
    assert isinstance(stop, Stop)
    found = found_of(target, stop.winner, stop.why, evidence, world.space)
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


def test_toolkits_guesses_stand_beside_what_was_measured() -> None:
    """A metric that is the cost itself, one that is its opposite, and a group that nobody guessed."""
    world, target = World(), Target(max_kl=0.02)
    stop, evidence = world.search(target)
    assert isinstance(stop, Stop)
    weights = {group.name: group.weights for group in world.space.groups}
    costs = {
        group: probe.kl.value / ERRORS[probe.types[group]] / weights[group]
        for probe in evidence.probes
        if (group := probe.alone) and group != "token_embd"
    }
    guesses = {group: {"right": cost**2, "wrong": -cost} for group, cost in costs.items()}
    found = found_of(target, stop.winner, stop.why, evidence, world.space, guesses)
    right, wrong = found.compared
    assert (right.metric, right.rank_correlation, right.in_common) == ("right", 1.0, 1.0)
    assert (wrong.rank_correlation, wrong.in_common < 0.5) == (-1.0, True)
    shown = {one.group: one.guesses for one in found.sensitivities}
    assert shown == {**guesses, "token_embd": {}}
    lines = list(lines_of(found))
    assert any(line.split() == ["right", "+1.00", "100%"] for line in lines)
    few = dict(list(guesses.items())[:2])
    assert found_of(target, None, "", evidence, world.space, few).compared == ()
