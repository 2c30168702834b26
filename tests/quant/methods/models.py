"""Tiny random models of each architecture, and blocks cut out of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quant.block import Decoder, DecoderBlock
from quant.families import FAMILIES
from quant.methods.base import BlockResult, LayerPlan, LayerRecord
from quant.methods.registry import load_method
from quant.scheme import Scheme

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": 7, "head_dim": 24},
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 4},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 7,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
    },
    "Gemma3ForCausalLM": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi3ForCausalLM": {"model_type": "phi3", "partial_rotary_factor": 0.75, "pad_token_id": 0},
    "SmolLM3ForCausalLM": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0],
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "Olmo2ForCausalLM": {"model_type": "olmo2"},
    "GraniteForCausalLM": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "Starcoder2ForCausalLM": {"model_type": "starcoder2"},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "head_dim": 16,
    },
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}
MIXTURES = ("Qwen3MoeForCausalLM", "MixtralForCausalLM")
FOUNDERS = tuple(ARCHITECTURES)[:4]  # enough where a test is slow and architectures do not matter
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def random_model(architecture: str, **changes: Any) -> nn.Module:
    """float32; norms and biases are random too. Embeddings have a few large channels, as real ones have."""
    values = {**COMMON, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(**values)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1.0 + 0.3 * noise if "norm" in name else 0.15 * noise
    embed = model.get_parameter("model.embed_tokens.weight")
    embed.data[:, ::13] *= 12.0
    return model.eval()


def config_of(model: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = model.config.to_dict()  # type: ignore[operator,union-attr]
    return values


def block_of(model: nn.Module, index: int = 0) -> DecoderBlock:
    """A copy of the model's block."""
    decoder = Decoder(type(model).__name__, config_of(model))
    return decoder.block(index, tensors_of(model, index))


def tensors_of(model: nn.Module, index: int) -> dict[str, Tensor]:
    """Of one layer, as a checkpoint has them: experts one by one."""
    layer = model.get_submodule(f"model.layers.{index}")
    found = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    experts = FAMILIES[type(model).__name__].experts
    if experts is None:
        return found
    found[f"{experts.router}.weight"] = found.pop("mlp.gate.weight")
    pairs = found.pop("mlp.experts.gate_up_proj"), found.pop("mlp.experts.down_proj")
    for number, (gate_up, down) in enumerate(zip(*pairs, strict=True)):
        gate, up = gate_up.chunk(2)
        for name, tensor in ((experts.gate, gate), (experts.up, up), (experts.down, down)):
            found[f"{experts.mixture}.experts.{number}.{name}.weight"] = tensor.clone()
    return found


class Batches(list[Tensor]):
    """Activations in memory."""


@torch.no_grad()
def inputs_of(model: nn.Module, batches: int = 4, samples: int = 4, tokens: int = 32) -> Batches:
    """What enters the first block for random, repetitive text."""
    generator = torch.Generator().manual_seed(11)
    embed = model.get_submodule("model.embed_tokens")
    shape = (samples, tokens)
    ids = [torch.randint(0, 128, shape, generator=generator).clamp(max=40 + 10 * n) for n in range(batches)]
    return Batches(embed(some) for some in ids)


def plans_for(
    block: DecoderBlock, scheme: Scheme | None, dtype: torch.dtype = torch.float16
) -> dict[str, LayerPlan]:
    return {name: LayerPlan(scheme=scheme, scale_dtype=dtype) for name in block.linears}


def run(
    method: str,
    block: DecoderBlock,
    inputs: Batches | None,
    scheme: Scheme | None,
    report: Callable[[LayerRecord], None] = lambda _: None,
    **options: float,
) -> BlockResult:
    return load_method(method).quantize(block, inputs, plans_for(block, scheme), options, report)


@torch.no_grad()
def block_error(block: DecoderBlock, original: DecoderBlock, inputs: Batches) -> float:
    errors = [(block(hidden) - original(hidden)).square().mean() for hidden in inputs]
    return float(torch.stack(errors).mean())
