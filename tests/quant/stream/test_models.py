"""Every method on real models: tiny-chat under each preset, stories260K where its odd shapes allow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from quant.errors import BadRecipe
from quant.methods.registry import method_names
from quant.recipe import TORCH_PRESETS
from tests.quant.stream.checkpoints import build, decoded, kl, logits_of

# nats on the text below; what is lost at random is told apart from what a method loses
WORST = {"fp4": 0.4, "int8": 0.01, "w8a16": 0.002, "gptq-w8g128": 0.002, "w8a8": 0.02}
WORST_OF_FOUR_BITS = 0.25
# Searches that look at a quarter of the text and try half of the ratios: a third of the time
OPTIONS: dict[str, dict[str, float]] = {
    "awq": {"tokens": 512, "ratios": 10},
    "smoothquant": {"tokens": 512},
    "best": {"tokens": 512, "ratios": 10, "steps": 15},
}
READ_BY_TRANSFORMERS = ("nf4", "fp4", "int8", "w4a16", "w8a16", "w8a8", "best")
PRESETS = [name for name, preset in TORCH_PRESETS.items() if preset.method in method_names()]
TEXT = "What is the capital of France? Paris is the capital of France, and it lies on the river Seine."


def text_of(model: Path) -> Tensor:
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    return torch.tensor([ids])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, one in TORCH_PRESETS.items() if one.method in method_names()]
)
def test_tiny_chat_under_every_preset(name: str, tiny_chat: Path, tmp_path: Path) -> None:
    preset, text = TORCH_PRESETS[name], text_of(tiny_chat)
    spec = preset.spec
    if preset.calibration:
        spec = {**spec, "calibration": {"samples": 16, "length": 128}}
    if preset.method in OPTIONS:
        spec = {**spec, "options": OPTIONS[preset.method]}
    variant = build(tiny_chat, spec, tmp_path, tokens=None).variant
    ours = logits_of(variant.path, decoded(variant.path, preset.format), text)
    assert kl(logits_of(tiny_chat, tokens=text), ours) < WORST.get(name, WORST_OF_FOUR_BITS)
    if name in READ_BY_TRANSFORMERS:
        assert kl(ours, logits_of(variant.path, tokens=text)) < (0.02 if name in ("int8", "w8a8") else 1e-3)


ROWS = {"bits": 4, "group": None, "symmetric": True}
ODD: list[tuple[dict[str, Any], str | None]] = [
    ({"method": "rtn", "format": "compressed-tensors", "scheme": ROWS}, None),
    ({"method": "gptq", "format": "compressed-tensors", "scheme": ROWS}, None),
    ({"method": "rtn", "format": "compressed-tensors-int8"}, None),
    (
        {"method": "rtn", "format": "compressed-tensors", "scheme": {**ROWS, "group": 64}, "skip": ["down"]},
        None,
    ),
    (
        {"method": "rtn", "format": "compressed-tensors", "scheme": {**ROWS, "group": 64}},
        "model.safetensors: tensor 'model.layers.0.mlp.down_proj.weight': "
        "172 input columns do not divide into groups of 64",
    ),
    (
        {"method": "gptq", "format": "gptq", "scheme": ROWS},
        "model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight': "
        "gptq packs 8 codes along the output; 172 rows are no multiple of that",
    ),
    (
        {"method": "rtn", "format": "awq", "scheme": {"bits": 4, "group": 32, "symmetric": False}},
        "model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight': "
        "awq packs 8 codes along the output; 172 rows are no multiple of that",
    ),
    ({"method": "nf4", "format": "bnb4"}, None),
    ({"method": "int8", "format": "bnb8"}, None),
    ({"method": "smoothquant", "format": "compressed-tensors-int8"}, None),
]


@pytest.mark.parametrize(
    ("spec", "refusal"),
    [pair for pair in ODD if pair[0]["method"] in method_names()],
    ids=lambda one: f"{one['method']} {one['format']}" if isinstance(one, dict) else None,
)
def test_stories_where_the_shape_allows(
    spec: dict[str, Any], refusal: str | None, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shared("models/stories260K")
    text = text_of(model)
    tokens = text[:, :24].repeat(4, 1)
    if refusal:
        with pytest.raises(BadRecipe) as caught:
            build(model, spec, tmp_path, tokens=tokens)
        assert str(caught.value) == refusal
        return
    variant = build(model, spec, tmp_path, tokens=tokens).variant
    ours = logits_of(variant.path, decoded(variant.path, spec["format"]), text)
    eight = spec["format"] in {"compressed-tensors-int8", "bnb8"}
    assert kl(logits_of(model, tokens=text), ours) < (0.02 if eight else 0.7)  # so small a model loses much
    if spec["format"] != "bnb4":  # on CPUs bitsandbytes wants rows in blocks
        assert kl(ours, logits_of(variant.path, tokens=text)) < 0.02
