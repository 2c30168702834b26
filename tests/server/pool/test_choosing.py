"""model:auto and the others, in situations made by hand."""

from typing import Any

import pytest

from server.pool.choosing import MODES, Candidate, Chosen, Mode, Situation, choose

GB = 10**9


def candidate(name: str, **changes: Any) -> Candidate:
    plain: dict[str, Any] = {
        "name": name,
        "state": "passed",
        "barred": False,
        "kl": 0.01,
        "bytes": GB,
        "memory": GB,
        "speed": 50.0,
        "loaded": False,
        "device": "cpu",
    }
    return Candidate(**(plain | changes))


VARIANTS = (
    candidate("q8_0", kl=0.001, bytes=8 * GB, memory=9 * GB, speed=40.0),
    candidate("q4_k_m", kl=0.03, bytes=4 * GB, memory=5 * GB, speed=70.0),
    candidate("q3_k_m", kl=0.12, bytes=3 * GB, memory=4 * GB, speed=60.0, state="degraded"),
    candidate("awq", kl=0.025, bytes=5 * GB, memory=6 * GB, speed=300.0, device="cuda"),
    candidate("q2_k", kl=0.9, bytes=2 * GB, memory=3 * GB, speed=90.0, state="rejected", barred=True),
)
CPU = frozenset({"cpu"})
LARGE = Situation(free_memory=64 * GB, devices=CPU)


def chosen(mode: Mode, situation: Situation, variants: tuple[Candidate, ...] = VARIANTS) -> str | None:
    return choose(mode, variants, situation).name


def test_auto_in_four_situations() -> None:
    gpu = Situation(free_memory=64 * GB, devices=frozenset({"cpu", "cuda"}))
    little = Situation(free_memory=4 * GB, devices=CPU)
    nothing = Situation(free_memory=GB, devices=CPU)
    assert chosen("auto", gpu) == "awq"  # the fastest that passed
    assert chosen("auto", LARGE) == "q4_k_m"  # without a GPU
    assert chosen("auto", little) == "q3_k_m"  # degraded, but nothing better fits
    loaded = tuple(
        candidate("q8_0", kl=0.001, memory=9 * GB, loaded=True) if v.name == "q8_0" else v for v in VARIANTS
    )
    assert chosen("auto", nothing, loaded) == "q8_0"  # it has its memory already
    assert chosen("auto", nothing) is None


def test_the_other_modes() -> None:
    assert chosen("best", LARGE) == "q8_0"
    assert chosen("fastest", LARGE) == "q4_k_m"
    assert chosen("smallest", LARGE) == "q3_k_m"


@pytest.mark.parametrize("mode", MODES)
def test_each_variant_gets_a_sentence_and_what_the_gate_bars_is_never_chosen(mode: Mode) -> None:
    found: Chosen = choose(mode, VARIANTS, LARGE)
    assert found.reasons.keys() == {one.name for one in VARIANTS}
    assert found.reasons["q2_k"] == "not chosen: the gate rejects it"
    assert "cuda" in found.reasons["awq"]
    assert sum(text.startswith("chosen") for text in found.reasons.values()) == 1
    assert choose(mode, VARIANTS[::-1], LARGE) == found  # whatever the order


def test_what_was_never_measured_comes_last() -> None:
    unknown = candidate("new", state="unmeasured", kl=None, speed=None, bytes=1, memory=1)
    for mode in ("auto", "best", "fastest"):
        assert chosen(mode, LARGE, (unknown, VARIANTS[1])) == "q4_k_m"
    assert chosen("auto", LARGE, (unknown,)) == "new"
