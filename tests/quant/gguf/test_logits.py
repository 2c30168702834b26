"""llama.cpp computes from our file what transformers computes from the checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf import GGUFReader

from tests.quant.gguf.support import (
    checkpoint,
    converted,
    llama_greedy,
    llama_logits,
    reference,
    rewrite,
    worst,
)

CLOSE = 1e-4  # of the largest logit; without flash attention, whose sums are F16 on a CPU
GELU = 2e-3  # llama.cpp looks it up in a table of F16
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 400, 48)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
GEMMA = {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 24, "attention_bias": False}
FULL = {**GEMMA, "layer_types": ["full_attention"] * 3}
PHI = {"pad_token_id": 0, "num_attention_heads": 4}
MOE = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}
LONG_PARTIAL = {
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
    },
}


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    arch: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    close: float = CLOSE
    listed: bool = False  # transformers reads the GGUF file and has no scaling to lose


CASES = [
    Case("llama", "LlamaForCausalLM", "llama", listed=True),
    Case(
        "llama-tied-bf16", "LlamaForCausalLM", "llama", {"tie_word_embeddings": True}, "bfloat16", listed=True
    ),
    Case("llama-no-gqa-f16", "LlamaForCausalLM", "llama", {"num_key_value_heads": 4}, "float16", listed=True),
    Case("llama-head-24", "LlamaForCausalLM", "llama", {"head_dim": 24}, listed=True),
    Case("llama-biases", "LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case(
        "llama-theta",
        "LlamaForCausalLM",
        "llama",
        {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
        listed=True,
    ),
    Case("llama3-rope", "LlamaForCausalLM", "llama", {"rope_scaling": LLAMA3}),
    Case("llama-linear", "LlamaForCausalLM", "llama", {"rope_scaling": LINEAR}),
    Case("llama-yarn", "LlamaForCausalLM", "llama", {"rope_scaling": YARN}),
    Case(
        "llama-yarn-factor", "LlamaForCausalLM", "llama", {"rope_scaling": {**YARN, "attention_factor": 1.5}}
    ),
    Case(
        "llama-yarn-mscale",
        "LlamaForCausalLM",
        "llama",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    Case("llama-yarn-smooth", "LlamaForCausalLM", "llama", {"rope_scaling": {**YARN, "truncate": False}}),
    Case("mistral", "MistralForCausalLM", "llama", {"sliding_window": None}, listed=True),
    Case(
        "mistral-window",
        "MistralForCausalLM",
        "llama",
        {"sliding_window": 4096, "max_position_embeddings": 32768},
        listed=True,
    ),
    Case("mistral-narrow", "MistralForCausalLM", "granite_swa", {"sliding_window": 9, "head_dim": 32}),
    Case("qwen2", "Qwen2ForCausalLM", "qwen2", listed=True),
    Case("qwen2-tied-yarn", "Qwen2ForCausalLM", "qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    Case("qwen2-llama3", "Qwen2ForCausalLM", "llama", {"rope_scaling": LLAMA3}),
    Case(
        "qwen2-narrow",
        "Qwen2ForCausalLM",
        "granite_swa",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    Case("qwen3-head-16", "Qwen3ForCausalLM", "qwen3", {"head_dim": 16}),
    Case("qwen3-wide", "Qwen3ForCausalLM", "qwen3", {"head_dim": 48, "tie_word_embeddings": True}),
    Case(
        "qwen3", "Qwen3ForCausalLM", "qwen3", listed=True
    ),  # transformers' reader knows no head size but 128
    Case("qwen3-yarn", "Qwen3ForCausalLM", "qwen3", {"rope_scaling": YARN}),
    Case("gemma2", "Gemma2ForCausalLM", "gemma2", GEMMA, close=GELU),
    Case(
        "gemma2-scaled-uncapped",
        "Gemma2ForCausalLM",
        "gemma2",
        {
            **GEMMA,
            "query_pre_attn_scalar": 37,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        close=GELU,
    ),
    Case("gemma2-full", "Gemma2ForCausalLM", "gemma2", FULL, close=GELU),
    Case("gemma3-full", "Gemma3ForCausalLM", "gemma3", FULL, close=GELU),
    Case("gemma3", "Gemma3ForCausalLM", "gemma3", GEMMA, close=GELU),
    Case(
        "gemma3-scaled",
        "Gemma3ForCausalLM",
        "gemma3",
        {
            **GEMMA,
            "query_pre_attn_scalar": 37,
            "final_logit_softcapping": 20.0,
            "rope_scaling": LINEAR,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        close=GELU,
    ),
    Case("phi3", "Phi3ForCausalLM", "phi3", PHI),
    Case("phi3-narrow", "Phi3ForCausalLM", "granite_swa", {**PHI, "sliding_window": 9}),
    Case("phi4-mini", "Phi3ForCausalLM", "phi3", {**PHI, **LONG_PARTIAL, "tie_word_embeddings": True}),
    Case(
        "phi4-mini-long",
        "Phi3ForCausalLM",
        "phi3",
        {**PHI, **LONG_PARTIAL, "original_max_position_embeddings": 32},
    ),
    Case(
        "smollm3-unwindowed",
        "SmolLM3ForCausalLM",
        "granite_swa",
        {"pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
    ),
    Case("smollm3", "SmolLM3ForCausalLM", "smollm3", {"pad_token_id": 0, "num_hidden_layers": 5}),
    Case(
        "smollm3-other",
        "SmolLM3ForCausalLM",
        "granite_swa",
        {
            "pad_token_id": 0,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    Case("olmo2", "Olmo2ForCausalLM", "olmo2"),
    Case("olmo2-tied", "Olmo2ForCausalLM", "olmo2", {"tie_word_embeddings": True, "rope_theta": 500000.0}),
    Case(
        "granite",
        "GraniteForCausalLM",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
            "tie_word_embeddings": True,
        },
    ),
    Case("granite-biases", "GraniteForCausalLM", "granite", {"attention_bias": True, "mlp_bias": True}),
    Case("starcoder2", "Starcoder2ForCausalLM", "starcoder2", {"sliding_window": 4096}, close=GELU),
    Case("qwen3-moe", "Qwen3MoeForCausalLM", "qwen3moe", {**MOE, "norm_topk_prob": True}),
    Case("qwen3-moe-unnormalized", "Qwen3MoeForCausalLM", "hy_v3", {**MOE, "head_dim": 24}),
    Case(
        "qwen3-moe-mixed",
        "Qwen3MoeForCausalLM",
        "hy_v3",
        {**MOE, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    Case("mixtral", "MixtralForCausalLM", "llama", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    Case("starcoder2-bare", "Starcoder2ForCausalLM", "starcoder2", {"use_bias": False}, close=GELU),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_agree(case: Case, tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "source", getattr(transformers, case.model), dtype=case.dtype, **case.config
    )
    gguf = converted(folder, tmp_path / "f32.gguf")
    theirs = reference(folder, TOKENS)

    assert worst(llama_logits(gguf, TOKENS), theirs) <= case.close

    reader = GGUFReader(gguf)
    assert reader.fields["general.architecture"].contents() == case.arch
    if case.listed:
        assert worst(_through_transformers(gguf), theirs) <= CLOSE


def _through_transformers(gguf: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    with torch.no_grad():
        logits: np.ndarray[Any, np.dtype[np.float32]] = model.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, LINEAR], ids=lambda scaling: str(scaling["rope_type"]))
def test_the_old_spelling_of_rope_scaling_gives_the_same_file(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "source", transformers.LlamaForCausalLM, rope_scaling=scaling)
    new = converted(folder, tmp_path / "new.gguf").read_bytes()
    old = {**scaling, "type": scaling["rope_type"]}
    del old["rope_type"]
    rewrite(folder / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=old)

    assert converted(folder, tmp_path / "old.gguf").read_bytes() == new


def test_a_config_of_defaults_alone_means_what_the_class_means(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", transformers.LlamaForCausalLM, num_key_value_heads=4)
    gone = (
        "attention_bias",
        "mlp_bias",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
    )
    rewrite(folder / "config.json", **dict.fromkeys((*gone, "tie_word_embeddings", "hidden_act")))

    assert (
        worst(llama_logits(converted(folder, tmp_path / "f32.gguf"), TOKENS), reference(folder, TOKENS))
        <= CLOSE
    )


def test_shards_make_the_same_file(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "whole", transformers.LlamaForCausalLM)
    sharded = checkpoint(tmp_path / "sharded", transformers.LlamaForCausalLM, shard="100KB")

    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, two = converted(whole, tmp_path / "1.gguf"), converted(sharded, tmp_path / "2.gguf")
    assert one.read_bytes() == two.read_bytes()


def test_real_models_agree(tiny_chat: Path, shared: Callable[[str], Path], tmp_path: Path) -> None:
    for folder in (tiny_chat, shared("models/stories260K")):
        gguf = converted(folder, tmp_path / "f32.gguf")
        assert worst(llama_logits(gguf, TOKENS), reference(folder, TOKENS)) <= CLOSE


def test_greedy_text_parts_only_at_ties(tiny_chat: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    gguf = converted(tiny_chat, tmp_path / "f16.gguf", "f16")
    tokenizer = Tokenizer.from_file(str(tiny_chat / "tokenizer.json"))
    for question in ("What is water?", "Tell me about Paris.", "Why is the sky blue?"):
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
        answer = llama_greedy(gguf, prompt, 64)
        rows = reference(tiny_chat, [*prompt, *answer])[len(prompt) - 1 : -1]
        chosen = rows[np.arange(len(answer)), answer]
        assert (rows.max(axis=1) - chosen).max() <= 1e-2
