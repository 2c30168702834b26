"""Tiny random models of several families, and transformers' own answers about them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.server.backends.torch_.support import Reference

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "sliding_window": 20,
        "query_pre_attn_scalar": 11,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
    },
    "phi3": {"sliding_window": 24, "partial_rotary_factor": 0.75},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "starcoder2": {"sliding_window": 24},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
}


def save_random(folder: Path, family: str, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Weights large enough that a wrong position or neighbour shows, in float32."""
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, {}) | changes))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
            elif "norm" not in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").touch()
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory, tiny_chat: Path) -> Callable[[str], Path]:
    found: dict[str, Path] = {"tiny-chat": tiny_chat}

    def folder(family: str) -> Path:
        if family not in found:
            found[family] = save_random(tmp_path_factory.mktemp(family), family)
        return found[family]

    return folder


@pytest.fixture(scope="session")
def reference(family_folder: Callable[[str], Path]) -> Callable[[str], Reference]:
    found: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in found:
            found[family] = Reference.of(family_folder(family))
        return found[family]

    return get
