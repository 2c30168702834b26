"""Toolkits' metrics of a whole model: what llama.cpp shows of a file is what transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quant.search.guesses import guesses_of
from quant.search.metrics import METRICS, Errors, Inputs
from quant.search.space import Group

TEXTS = [list(range(20, 60)), list(range(300, 420, 3))]
ROLES = {
    "attn_q": "self_attn.q_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def groups(*pairs: tuple[str, str]) -> list[Group]:
    return [Group(name=name, tensors=(tensor,), weights=1, sizes={}) for name, tensor in pairs]


def hooked(folder: Path, modules: list[str]) -> dict[str, tuple[Errors, Inputs]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, Inputs] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: Any) -> None:
            found = Inputs.of(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())
            seen[name] = seen[name] + found if name in seen else found

        return hook

    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        for text in TEXTS:
            model(torch.tensor([text]))
    weights = {name: model.get_submodule(name).weight.detach().numpy() for name in modules}
    return {name: (Errors.of(weights[name]), seen[name]) for name in modules}


def test_metrics_are_those_of_transformers_under_either_name(tiny_chat: Path, gguf_f32: Path) -> None:
    names = {f"blk.3.{role}.weight": f"model.layers.3.{module}" for role, module in ROLES.items()}
    wanted = groups(*((name, name) for pair in names.items() for name in pair), ("none", "blk.99.no.weight"))
    found = guesses_of(gguf_f32 / "model.gguf", wanted, TEXTS, 1)
    assert set(found) == {*names, *names.values()}
    expected = hooked(tiny_chat, list(names.values()))
    for tensor, module in names.items():
        assert found[tensor] == found[module]
        by_hand = {name: metric(*expected[module]) for name, metric in METRICS.items()}
        assert dict(found[module]) == pytest.approx(by_hand, rel=2e-3)


def test_a_group_is_as_sensitive_as_its_most_sensitive_linear(gguf_f32: Path) -> None:
    pair = ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    both = Group(name="both", tensors=pair, weights=1, sizes={})
    found = guesses_of(gguf_f32 / "model.gguf", [both, *groups(*zip(pair, pair, strict=True))], TEXTS, 1)
    for metric in METRICS:
        assert found["both"][metric] == max(found[one][metric] for one in pair)
