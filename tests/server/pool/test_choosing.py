"""model:auto and the others, in situations made by hand."""

from pathlib import Path
from typing import Any

import pytest

from quant.manifest import BuilderRecord, Manifest, RecipeRecord, SourceRecord
from quant.measure.gate import Gate, Verdict
from quant.measure.report import Judged
from quant.store import Variant
from server.backends import registry
from server.catalog import Model
from server.pool.choosing import MODES, Candidate, Chosen, Mode, Situation, choose
from server.pool.gating import candidate as of_judged

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
    for mode in MODES:
        assert chosen(mode, LARGE, (unknown, VARIANTS[1])) == "q4_k_m"
        assert chosen(mode, LARGE, (unknown,)) == "new"


def test_what_is_served_against_the_gate_comes_after_that() -> None:
    coarse = candidate("q2_k", kl=0.9, bytes=2, memory=2, speed=900.0, state="rejected", barred=False)
    unknown = candidate("new", state="unmeasured", kl=None, speed=None)
    for mode in MODES:
        assert chosen(mode, LARGE, (coarse, unknown, VARIANTS[2])) == "q3_k_m"
        assert chosen(mode, LARGE, (coarse, unknown)) == "new"
        assert chosen(mode, LARGE, (coarse,)) == "q2_k"


@pytest.mark.parametrize("mode", MODES)
def test_neither_the_reference_nor_what_nothing_opens_is_chosen(mode: Mode) -> None:
    reference = candidate("f32", state="unmeasured", kl=None, speed=None, bytes=1, is_reference=True)
    closed = candidate("nf4", kl=0.0001, bytes=1, speed=999.0, problem="bitsandbytes: torch is missing")
    found = choose(mode, (reference, closed, VARIANTS[1]), LARGE)
    assert found.name == "q4_k_m"
    assert "measured against" in found.reasons["f32"]
    assert found.reasons["nf4"] == "not chosen: bitsandbytes: torch is missing"


def judged_by_hand(name: str, format_name: str) -> Judged:
    manifest = Manifest(
        schema_version=1,
        key="0" * 32,
        source=SourceRecord(id="m", revision=None, digest="1" * 64),
        recipe=RecipeRecord(name=name, body={}, digest="2" * 64),
        format=format_name,
        bits_per_weight=8.0,
        bytes=10,
        builder=BuilderRecord(version=1, packages={}),
        files=(),
    )
    return Judged(Variant("0" * 32, Path("v"), manifest), Gate(), None, Verdict("unmeasured"))


def test_candidates_say_what_opens_them_and_what_is_only_a_reference() -> None:
    plain, listing = (Model(id="m", source="s", variants=v, default="q8_0") for v in (("q8_0",), ("f32",)))
    found = of_judged(plain, judged_by_hand("f32", "gguf"), loaded=False)
    assert (found.is_reference, found.problem, found.device) == (True, "", "cpu")
    assert not of_judged(listing, judged_by_hand("f32", "gguf"), loaded=False).is_reference
    assert not of_judged(plain, judged_by_hand("q8_0", "gguf"), loaded=False).is_reference
    unknown = of_judged(plain, judged_by_hand("x", "strange"), loaded=False)
    assert "no backend can open format 'strange'" in unknown.problem
    assert not of_judged(plain, judged_by_hand("x", "strange"), loaded=True).problem  # it is open


def test_a_backend_may_name_the_device_that_it_needs() -> None:
    class OnGpus:
        device = "cuda"

    assert registry.device_of(OnGpus()) == "cuda"  # type: ignore[arg-type]
    assert registry.device_of(registry.load("llama")) == "cpu"
