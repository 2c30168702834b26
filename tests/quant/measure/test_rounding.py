"""Matrices beside the source's: whole ones are about as far as rounding makes them, broken ones are not."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.gguf.rounding import is_known, rounded, unpacked
from quant.measure import rounding
from quant.measure.gate import Gate, judge
from quant.measure.measurement import Rounding
from quant.measure.rounding import gguf_pairs, rounding_of, row_step
from quant.measure.unfolded import torch_pairs
from tests.conftest import build
from tests.quant.measure.breaking import change_tensors, swap_bytes, swap_scales, zero_block, zero_bytes
from tests.quant.measure.measurements import measurement

LOOK = {"samples": 4, "length": 64}
TORCH: dict[str, dict[str, Any]] = {
    "w4a16": {"method": "rtn", "format": "compressed-tensors"},
    "mixed": {
        "method": "rtn",
        "format": "compressed-tensors",
        "overrides": [["down_proj", {"bits": 8, "group": None}]],
    },
    "gptq": {"method": "gptq", "format": "gptq", "calibration": LOOK},
    "awq": {"method": "awq", "format": "awq", "calibration": LOOK, "options": {"ratios": 4}},
    "w8a8": {"method": "smoothquant", "format": "compressed-tensors-int8", "calibration": LOOK},
    "nf4": {"method": "nf4", "format": "bnb4"},
    "int8": {"method": "int8", "format": "bnb8"},
}
SCALE = {"gptq": "scales", "awq": "scales", "nf4": "weight.absmax", "int8": "SCB"}


def verdict(found: Rounding | None) -> str:
    """Of a 4-bit variant that is fine otherwise."""
    assert found is not None
    return str(judge(measurement(0.05, rounding=found), Gate()))


@pytest.mark.parametrize("recipe", ["q4_k_m", "q2_k"])
def test_gguf(tmp_path: Path, session_cache: Path, tiny_chat: Path, gguf_f32: Path, recipe: str) -> None:
    folder = build(session_cache, tiny_chat, recipe)
    source = gguf_f32 / "model.gguf"
    found = rounding_of(gguf_pairs(source, folder / "model.gguf"))
    assert found is not None
    assert found.matrices == 85 + 25, "and the norms"
    assert max(one.times for one in found.worst) < 1.6
    assert verdict(found) == "passed"
    norms = partial(swap_bytes, one="blk.4.ffn_norm.weight", other="blk.7.ffn_norm.weight")
    broken: list[Callable[[Path], None]] = [partial(zero_block, block=5), norms]
    if recipe != "q2_k":
        swap = partial(swap_scales, one="blk.3.attn_k.weight", other="blk.9.attn_k.weight")
        broken += [swap, partial(zero_bytes, name="blk.2.ffn_gate.weight", count=144)]
    for number, harm in enumerate(broken):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        harm(copy)
        said = verdict(rounding_of(gguf_pairs(source, copy / "model.gguf")))
        assert said.startswith("rejected"), said
        assert "max_times_rounding" in said


@pytest.mark.parametrize("recipe", sorted(TORCH))
def test_torch(tmp_path: Path, tiny_two_blocks: Path, recipe: str) -> None:
    folder = build_spec(tmp_path / "cache", tiny_two_blocks, TORCH[recipe])
    method = TORCH[recipe]["method"]
    assert verdict(rounding_of(torch_pairs(tiny_two_blocks, folder, method))) == "passed"
    zeroed, swapped = tmp_path / "zeroed", tmp_path / "swapped"
    for copy in (zeroed, swapped):
        shutil.copytree(folder, copy)
    scale = SCALE.get(recipe, "weight_scale")
    one, other = (f"model.layers.{n}.self_attn.q_proj.{scale}" for n in (0, 1))

    def swap(tensors: dict[str, Any]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    def zero(tensors: dict[str, Any]) -> None:
        tensors[one].zero_()

    change_tensors(zeroed, zero)
    assert "max_times_rounding" in verdict(rounding_of(torch_pairs(tiny_two_blocks, zeroed, method)))
    change_tensors(swapped, swap)
    assert "max_times_rounding" in verdict(rounding_of(torch_pairs(tiny_two_blocks, swapped, method)))


def test_norms_of_another_block_are_told(tmp_path: Path, tiny_two_blocks: Path) -> None:
    folder = tmp_path / "swapped"
    shutil.copytree(build_spec(tmp_path / "cache", tiny_two_blocks, TORCH["nf4"]), folder)
    one, other = (f"model.layers.{n}.input_layernorm.weight" for n in (0, 1))

    def swap(tensors: dict[str, Any]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    change_tensors(folder, swap)
    said = verdict(rounding_of(torch_pairs(tiny_two_blocks, folder, "nf4")))
    assert said.startswith("rejected")
    assert "input_layernorm" in said


@pytest.mark.parametrize("largest", [rounding.LARGEST, 5000])
def test_floats_of_any_size_are_compared(
    tmp_path: Path, tiny_two_blocks: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """Of large ones some rows; here a few thousand rows of the embedding have changed places."""
    monkeypatch.setattr(rounding, "LARGEST", largest)
    folder = tmp_path / "moved"
    shutil.copytree(build_spec(tmp_path / "cache", tiny_two_blocks, TORCH["nf4"]), folder)
    found = rounding_of(torch_pairs(tiny_two_blocks, folder, "nf4"))
    assert verdict(found) == "passed"

    def move(tensors: dict[str, Any]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)

    change_tensors(folder, move)
    assert "embed_tokens" in verdict(rounding_of(torch_pairs(tiny_two_blocks, folder, "nf4")))


def build_spec(cache: Path, source: Path, spec: dict[str, Any]) -> Path:
    from quant.pipeline import build_variant
    from quant.recipe import parse_recipe
    from quant.source import open_source
    from quant.store import VariantStore

    opened = open_source(str(source), cache=cache)
    recipe = parse_recipe(json.loads(json.dumps(spec)))
    return build_variant(opened, recipe, VariantStore(cache), progress=lambda _: None).variant.path


@pytest.fixture(scope="module")
def tiny_two_blocks(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's first two blocks: trained weights, quickly quantized."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("two")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_chat / name, folder / name)
    config = json.loads((tiny_chat / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(tiny_chat / "model.safetensors")
    few = {name: one for name, one in tensors.items() if ".layers." not in name or ".layers.0." in name}
    few |= {name: one for name, one in tensors.items() if ".layers.1." in name}
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_large_matrices_are_read_in_part() -> None:
    assert row_step(1024, 1024 * 256, sampled=False) == 1
    assert row_step(16_384, 16_384 * 512, sampled=False) == 1
    assert row_step(150_000, 150_000 * 1024, sampled=False) == 5
    assert row_step(150_000, 150_000 * 1024, sampled=True) == 2343
    assert row_step(32, 32 * 64, sampled=True) == 1


def test_types_are_unpacked_as_gguf_does() -> None:
    import gguf

    rows = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for kind in ("q8_0", "q4_k", "q6_k", "iq4_xs", "q5_1"):
        assert is_known(kind)
        number = gguf.GGMLQuantizationType[kind.upper()]
        again = rounded(kind, rows)
        assert np.square(again - rows).mean() < 0.02
        if kind in {"q8_0", "q5_1"}:
            packed = gguf.quants.quantize(rows, number)
            assert np.array_equal(unpacked(kind, packed), gguf.quants.dequantize(packed, number))
    assert not is_known("q9_9")
