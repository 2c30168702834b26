"""The architectures that the methods quantize, as data. A new one is one row.

Names are those of the checkpoint, which are transformers' module paths. What llama.cpp needs to know of the
same architectures is in quant.gguf.families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from quant.errors import UnsupportedArchitecture


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleGroup:
    """Channels that can be rescaled without changing the model: `source` gives x / s, `linears` take W * s.

    `source` is a norm or a linear whose output reaches the linears channel by channel, through nothing or an
    elementwise product (the attention's average over tokens keeps v_proj's channels apart).
    """

    source: str
    linears: tuple[str, ...]
    module: str  # the smallest module that holds them all: its output error is what a search looks at
    per_head: str | None = None  # the attention whose heads the channels are: query heads share kv heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row. Names of linears and norms are below a block, the others below the root."""

    package: str  # transformers' module with the classes
    prefix: str  # of the classes: LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding
    shared_inputs: tuple[tuple[str, ...], ...]  # linears that read the same input, in order of computation
    scale_groups: tuple[ScaleGroup, ...]
    window: Literal["none", "all", "typed"]  # which layers have one; typed: see layer_types
    unclipped: frozenset[str]  # linears whose output goes through a softmax: clipping weights hurts them
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """In the order of computation."""
        return tuple(name for group in self.shared_inputs for name in group)

    def block_name(self, index: int) -> str:
        return f"{self.blocks}.{index}"


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


def _llama_like(package: str, prefix: str, window: Literal["none", "all", "typed"]) -> Family:
    """Pre-norm blocks of rotary attention and a gated MLP under Llama's names."""
    return Family(
        package=f"transformers.models.{package}.modeling_{package}",
        prefix=prefix,
        shared_inputs=(QKV, ("self_attn.o_proj",), GATED, ("mlp.down_proj",)),
        scale_groups=(
            ScaleGroup(source="input_layernorm", linears=QKV, module="self_attn"),
            ScaleGroup(
                source="self_attn.v_proj",
                linears=("self_attn.o_proj",),
                module="self_attn.o_proj",
                per_head="self_attn",
            ),
            ScaleGroup(source="post_attention_layernorm", linears=GATED, module="mlp"),
            ScaleGroup(source="mlp.up_proj", linears=("mlp.down_proj",), module="mlp.down_proj"),
        ),
        window=window,
        unclipped=frozenset(QKV[:2]),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama_like("llama", "Llama", "none"),
        "MistralForCausalLM": _llama_like("mistral", "Mistral", "all"),
        "Qwen2ForCausalLM": _llama_like("qwen2", "Qwen2", "typed"),
        "Qwen3ForCausalLM": _llama_like("qwen3", "Qwen3", "typed"),
    }
)


def family_of(architecture: str) -> Family:
    if family := FAMILIES.get(architecture):
        return family
    raise UnsupportedArchitecture(
        f"architecture {architecture!r:.80} is not supported (known: {', '.join(FAMILIES)})"
    )
