"""Mixtures of experts: each expert is quantized on the tokens that are sent to it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.measure.decoded import decoded_model
from tests.quant.stream.checkpoints import TOKENS, build, family_checkpoint, kl, source_logits

RECIPE = {"method": "gptq", "format": "compressed-tensors", "scheme": {"bits": 4, "group": 64}}
EXPERTS, CHOSEN, UNCHOSEN = 5, 2, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the first four experts have a positive score for every token; the last one's is always 0."""
    folder = family_checkpoint(
        tmp_path_factory.mktemp("models") / "moe", "Qwen3MoeForCausalLM", num_experts=EXPERTS
    )
    weights = load_file(folder / "model.safetensors")
    for name, router in weights.items():
        if name.endswith("mlp.gate.weight"):
            router[1], router[3], router[UNCHOSEN] = -router[0], -router[2], 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_are_counted_and_the_starved_one_is_listed(model: Path, tmp_path: Path) -> None:
    variant = build(model, RECIPE, tmp_path).variant
    records = json.loads((variant.path / "quantization.json").read_text())["modules"]
    assert len(records) == 2 * (4 + 3 * EXPERTS)
    for layer in range(2):
        mine = {
            one["module"].split(".experts.")[1]: one
            for one in records
            if one["module"].startswith(f"model.layers.{layer}.mlp.experts.")
        }
        counts = [mine[f"{expert}.up_proj"]["tokens"] for expert in range(EXPERTS)]
        assert sum(counts) == CHOSEN * TOKENS.numel()
        assert counts[UNCHOSEN] == 0
        for expert in range(EXPERTS):
            for linear in ("gate_proj", "up_proj", "down_proj"):
                one = mine[f"{expert}.{linear}"]
                assert one["tokens"] == counts[expert]
                assert (one["fallback"] or "").startswith("a starved expert: 0 tokens") is (
                    expert == UNCHOSEN
                )
    assert all(one["tokens"] is None for one in records if ".self_attn." in one["module"])
    (note,) = json.loads((variant.path / "build.json").read_text())["notes"]
    assert note.startswith(
        "6 linears of starved experts are rounded to nearest: model.layers.0.mlp.experts.4."
    )
    config = json.loads((variant.path / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(config["ignore"])


def test_transformers_computes_with_the_decoded_experts(model: Path, tmp_path: Path) -> None:
    variant = build(model, RECIPE, tmp_path).variant
    with torch.no_grad():
        logits = decoded_model(variant.path)(input_ids=TOKENS).logits
    assert kl(source_logits(model), logits) < 0.5
