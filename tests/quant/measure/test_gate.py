"""What a measurement means: each limit alone, doubts of one that was cut short, bands, other files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from quant.manifest import BuilderRecord, FileRecord, Manifest, RecipeRecord, SourceRecord
from quant.measure.gate import Gate, judge, nominal_bits
from quant.measure.measurement import (
    Figure,
    Health,
    files_digest,
    read_measurement,
    write_measurement,
)
from quant.recipe import PRESETS
from tests.quant.measure.measurements import measurement

OPEN = Gate(max_kl=None, min_top1=None)  # but for the band


def test_nothing_is_known_of_what_was_not_measured() -> None:
    assert judge(None, Gate(max_kl=0.0)).state == "unmeasured"


@dataclass(frozen=True)
class Limit:
    gate: Gate
    beyond: dict[str, Any]
    named: str


@pytest.mark.parametrize(
    "limit",
    [
        Limit(Gate(), {"kl": 0.31}, "max_kl"),
        Limit(Gate(), {"top1": Figure(0.69, 0.0)}, "min_top1"),
        Limit(replace(OPEN, max_kl_p99=1.0), {"p99": 1.1}, "max_kl_p99"),
        Limit(replace(OPEN, max_ppl_ratio=1.5), {"ppl_ratio": Figure(1.6, 0.0)}, "max_ppl_ratio"),
        Limit(OPEN, {"finite": False}, "NaN"),
        Limit(OPEN, {"bits": 8, "kl": 0.021}, "max_times_band: 8 bits promise 0.002"),
    ],
)
def test_each_limit_rejects_alone_and_says_its_name(limit: Limit) -> None:
    assert judge(measurement(), limit.gate).state == "passed"
    verdict = judge(measurement(**limit.beyond), limit.gate)
    assert verdict.state == "rejected"
    assert len(verdict.reasons) == 1
    assert limit.named in verdict.reasons[0]


def test_a_measurement_that_was_cut_short_rejects_only_what_is_certain() -> None:
    for error, state in ((0.06, "degraded"), (0.01, "rejected")):
        assert judge(measurement(0.40, error=error, complete=False), Gate()).state == state
        assert judge(measurement(0.40, error=error), Gate()).state == "rejected"


def test_a_variant_worse_than_its_bits_is_degraded() -> None:
    assert judge(measurement(0.08), Gate()).state == "degraded"
    assert judge(measurement(0.07, bits=3), Gate()).state == "passed"
    assert judge(measurement(0.08, bits=2), Gate()).state == "degraded", "or auto would prefer it to 4 bits"
    assert judge(measurement(0.008, bits=7), Gate()).state == "degraded"
    assert judge(measurement(0.003, bits=8), Gate()).state == "degraded"
    loops = Health(loops=0.6, source_loops=0.2)
    assert "repeat" in judge(measurement(health=loops), Gate()).reasons[0]


def test_every_preset_has_bits() -> None:
    bits = {name: nominal_bits(recipe.body, 4.9) for name, recipe in PRESETS.items()}
    assert all(bits.values()), bits
    wanted = {"q8_0": 8, "q4_k_m": 4, "iq2_xxs": 2, "bf16": 16, "nf4": 4, "int8": 8, "w8a8": 8, "w4a16": 4}
    assert {name: bits[name] for name in wanted} == wanted
    mixture = {"type": "q6_k", "overrides": [["ffn_down", "q4_k"]]}
    assert nominal_bits(mixture, 5.6) == 5  # it is held to what its mean promises


def test_a_measurement_is_that_of_its_files_only(tmp_path: Path) -> None:
    manifest = Manifest(
        key="0" * 32,
        source=SourceRecord(id="x", revision=None, digest="1" * 64),
        recipe=RecipeRecord(name="q4_k_m", body={}, digest="2" * 64),
        format="gguf",
        bits_per_weight=4.8,
        bytes=1,
        builder=BuilderRecord(version=1, packages={}),
        files=(FileRecord(path="model.gguf", size=1, sha256="3" * 64),),
    )
    written = measurement(files=files_digest(manifest))
    assert read_measurement(tmp_path, manifest) is None
    write_measurement(tmp_path, written)
    assert read_measurement(tmp_path, manifest) == written
    other = replace(manifest, files=(replace(manifest.files[0], sha256="4" * 64),))
    assert read_measurement(tmp_path, other) is None
    (tmp_path / "measurement.json").write_bytes(b"{")
    assert read_measurement(tmp_path, manifest) is None
