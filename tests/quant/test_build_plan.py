"""A plan says what the build will do, without torch, and refuses what the build would."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant import PRESETS, open_source, parse_recipe, plan_build
from quant.errors import BadRecipe
from quant.formats import registry
from quant.scheme import Scheme
from quant.text_choice import choose_text
from quant.torch_plan import _unfit
from quant.torch_recipe import RULES, TORCH_PRESETS, Calibration
from tests.quant.checkpoints import write_checkpoint

AFFINE = {name: rule for name, rule in RULES.items() if rule.schemes}
SCHEMES = [
    (name, Scheme(bits=bits, group=group, symmetric=symmetric))
    for name, rule in AFFINE.items()
    for bits, symmetric in rule.schemes
    for group in rule.groups
]


@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 300), st.booleans())
def test_what_formats_refuse_is_known_without_torch(
    pair: tuple[str, Scheme], rows: int, columns: int, whole: bool
) -> None:
    name, scheme = pair
    shape = (rows * 8, columns * 32) if whole else (rows, columns)
    assert _unfit(*shape, scheme, name) == registry.load(name).refuse(shape, scheme)


@pytest.mark.parametrize("name", TORCH_PRESETS)
def test_every_preset_can_be_planned(name: str, tiny_chat: Path, tmp_path: Path) -> None:
    plan = plan_build(open_source(str(tiny_chat), cache=tmp_path), PRESETS[name], device="cpu")
    assert sum(row.count for row in plan.rows) == len(plan.modules) == 84
    assert sum(row.bytes for row in plan.rows) == sum(one.bytes for one in plan.modules)
    assert plan.modules[0].module == "model.layers.0.self_attn.q_proj"
    assert plan.output_bytes <= plan.scratch_bytes
    assert (plan.text is None) == (TORCH_PRESETS[name].calibration is None)
    assert plan.seconds > 0
    assert plan.memory_bytes > 0


def test_a_gguf_plan_has_one_row(tiny_chat: Path, tmp_path: Path) -> None:
    plan = plan_build(open_source(str(tiny_chat), cache=tmp_path), parse_recipe("q4_k_m"))
    assert [(row.count, row.scheme) for row in plan.rows] == [(85, "q4_k_m")]
    assert "falls back" in plan.notes[0]


def test_a_gguf_source_has_no_torch_formats(gguf_f32: Path, tmp_path: Path) -> None:
    source = open_source(str(gguf_f32 / "model.gguf"), cache=tmp_path)
    with pytest.raises(BadRecipe, match="nf4 needs a checkpoint in safetensors"):
        plan_build(source, parse_recipe("nf4"))
    with pytest.raises(BadRecipe, match="device is auto, cpu or cuda, not 'tpu'"):
        plan_build(source, parse_recipe("q4_0"), device="tpu")


def test_a_source_too_large_to_write_calibrates_on_the_prompts(tmp_path: Path) -> None:
    from dataclasses import replace

    from quant.layout import read_layout

    source = open_source(str(write_checkpoint(tmp_path / "m")), cache=tmp_path)
    layout = read_layout(source)
    text = choose_text(Calibration(), layout, "cpu")
    assert (text.kind, text.length, text.note) == ("self", 128, None)  # the model's context
    wide = replace(layout.blocks[0]["mlp.down_proj.weight"], shape=(1 << 15, 1 << 15))
    large = tuple({**block, "wide": wide} for block in layout.blocks)
    text = choose_text(Calibration(), replace(layout, blocks=large), "cpu")
    assert text.kind == "prompts"
    assert text.note is not None
    assert "2.1 billion weights are too many" in text.note
    assert choose_text(Calibration(samples=8), replace(layout, blocks=large), "cuda").kind == "self"


def test_planning_and_parsing_need_no_torch(tiny_chat: Path, tmp_path: Path) -> None:
    """A machine without it is told so in one line, before anything is done."""
    code = f"""
import sys
sys.modules["torch"] = None
import importlib.util
real = importlib.util.find_spec
from quant import *
source = open_source({str(tiny_chat)!r}, cache=__import__("pathlib").Path({str(tmp_path)!r}))
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
import quant.torch_plan
quant.torch_plan.find_spec = importlib.util.find_spec
try:
    plan_build(source, parse_recipe("gptq-w4g128"))
except QuantError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "gptq-w4g128 needs torch, which is not installed (the extra quantserve[torch])\n"
