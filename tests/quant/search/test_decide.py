"""The decisions of a search, in a world whose divergences are known."""

import re

import pytest
from msgspec.structs import replace

from quant.errors import BadRecipe
from quant.measure.measurement import Figure
from quant.patterns import is_plain
from quant.search.decide import Confirm, ProbeTypes, Stop, TryRecipe, next_step
from quant.search.evidence import Evidence
from quant.search.space import patterns_of
from quant.search.target import Target, parse_target
from tests.quant.search.world import World


@pytest.mark.parametrize("limit", [0.004, 0.02, 0.1, 0.4])
def test_a_mixture_beats_every_preset_that_meets_the_divergence(limit: float) -> None:
    world = World()
    found, evidence = world.search(Target(max_kl=limit))
    assert found.winner is not None
    assert found.winner.kl.value <= limit
    assert found.winner.stage == "mixture"
    every = [world.tried(one.name, "preset") for one in world.space.presets]  # those that were left out, too
    meeting = [one for one in every if one.kl.value <= limit]
    assert all(found.winner.bytes < one.bytes for one in meeting)
    assert "fewer than" in found.why
    assert len(evidence.tries) + len(evidence.mixtures) < 25


def test_within_bytes_the_mixture_is_nearer_to_the_source_than_any_preset() -> None:
    world = World()
    for target in (Target(max_bytes=6_400_000), Target(target_bpw=6.0), Target(target_bpw=4.95)):
        found, _ = world.search(target)
        assert found.winner is not None
        assert target.met_by(found.winner)
        if target.target_bpw is not None:  # the room is used, though predictions count texts and bits do not
            assert found.winner.bits_per_weight > 0.97 * target.target_bpw
        every = [world.tried(one.name, "preset") for one in world.space.presets]
        fitting = [one for one in every if target.met_by(one)]
        assert found.winner.kl.value < min(one.kl.value for one in fitting)


@pytest.mark.parametrize("target", [Target(max_kl=0.4), Target(max_bytes=5_200_000), Target(target_bpw=4.95)])
def test_what_the_gate_rejects_cannot_win(target: Target) -> None:
    """It would be answered with a 409 for ever."""
    free, _ = World().search(target)
    assert free.winner is not None
    world = World(gate=0.9 * free.winner.kl.value)
    found, evidence = world.search(target)
    assert any(one.rejected for one in evidence.tries)
    if found.winner is not None:
        assert not found.winner.rejected
        assert found.winner.kl.value <= world.gate
    assert found.winner is None or target.max_kl is None or found.winner.bytes >= free.winner.bytes
    assert "would be better, but the gate rejects it: it is too far" in found.why
    barred, _ = World(gate=0.0).search(target)
    assert barred.winner is None
    assert "the gate rejects it" in barred.why


def test_that_none_meets_it_is_said_with_the_nearest() -> None:
    world = World()
    found, evidence = world.search(Target(max_bytes=1_500_000))
    assert found.winner is None
    assert not evidence.probes  # nothing could be small enough: no time is lost
    found, evidence = World(scale=1e6).search(Target(max_kl=0.001))
    assert found.winner is None
    assert "none of" in found.why
    assert len(evidence.tries) >= 2


def test_where_the_smallest_preset_meets_it_nothing_else_is_tried() -> None:
    world = World(scale=1e-4)
    found, evidence = world.search(Target(max_kl=1.0))
    assert found.winner is not None
    assert found.winner.variant == world.space.presets[-1].name
    assert not evidence.probes


def test_a_winner_that_misses_when_it_is_measured_in_full_gives_way() -> None:
    world, target = World(), Target(max_kl=0.02)
    found, evidence = world.search(target)
    assert found.winner is not None
    worse = replace(found.winner, kl=Figure(0.0203, 0.001))
    again, _ = world.search(target, evidence.with_try(worse))
    assert again.winner is not None
    assert again.winner.key != found.winner.key
    assert again.winner.kl.value <= 0.02


def test_a_search_goes_on_where_it_was() -> None:
    """Whatever part of the evidence is kept, the same steps follow."""
    world, target = World(), Target(max_kl=0.02)
    _, evidence = world.search(target)
    steps = [step for step in world.steps if isinstance(step, TryRecipe | ProbeTypes)]
    for count in (0, 1, 5, 20, len(evidence.probes) - 2):
        part = Evidence(evidence.tries[: min(count, 5)], evidence.probes[: max(0, count - 5)])
        step = next_step(target, world.space, part)
        assert step in steps or isinstance(step, Confirm | Stop)


def test_each_pattern_names_its_tensors_alone() -> None:
    """World._types_of asserts it; long models need several patterns a role."""
    names = [f"blk.{layer}.{role}.weight" for layer in range(126) for role in ("attn_q", "ffn_gate_exps")]
    patterns = patterns_of([*names[::2], "token_embd.weight"])
    assert all(is_plain(pattern) for pattern in patterns)
    for number, name in enumerate(names):
        assert sum(bool(re.search(pattern, name)) for pattern in patterns) == (number % 2 == 0)


def test_targets_are_read_strictly() -> None:
    assert parse_target({"max_kl": 0.02}) == Target(max_kl=0.02)
    assert parse_target({"max_bytes": 10**9}) == Target(max_bytes=10**9)
    assert parse_target({"target_bpw": 4}) == Target(target_bpw=4.0)
    torch = {"max_kl": 0.1, "format": "compressed-tensors"}
    assert parse_target(torch) == Target(max_kl=0.1, format="compressed-tensors")
    for wrong in (
        {},
        {"max_kl": 0.1, "format": "awq"},
        {"format": "gguf"},
        {"max_kl": 0.02, "max_bytes": 1},
        {"bits": 4},
        {"max_kl": "x"},
        {"max_kl": True},
        {"max_kl": 0},
        {"max_kl": float("nan")},
        {"max_bytes": 0.5},
    ):
        with pytest.raises(BadRecipe):
            parse_target(wrong)
