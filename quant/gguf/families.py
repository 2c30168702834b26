"""The architectures we convert, as data: what configs leave out, what a block is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gguf import Keys

from quant.errors import UnsupportedArchitecture
from quant.gguf import llama_graphs as graphs
from quant.gguf.llama_graphs import ATTENTION, MLP, Graph

SILU = frozenset({"silu", "swish"})
TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new"})  # llama.cpp's GELU is the one by tanh
Sizes = tuple[str, ...]  # names of Shape.sizes: (n,) is a norm, (rows, columns) a linear, three are experts


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Where a config says how many experts there are, how many a token meets, and how wide they are."""

    count: tuple[str, ...]  # the first that is there
    used: str
    width: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: a transformers class."""

    graphs: tuple[Graph, ...]  # the first that can compute the checkpoint is used
    block: Mapping[str, Sizes]  # modules below a block, in order
    dense_block: Mapping[str, Sizes] = field(default_factory=dict)  # of layers without experts
    defaults: Mapping[str, Any]  # of the class, for keys that older configs leave out
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # key of the config -> linears with a bias
    fixed_biases: tuple[str, ...] = ()
    activation: tuple[str, frozenset[str]] = ("hidden_act", SILU)  # key, and what it may say
    norm_epsilon: str = "rms_norm_eps"
    layer_norm: bool = False  # norms subtract the mean and have a bias
    norm_offset: float = 0.0  # what is added to a norm's weight
    window_switch: bool = False  # the window counts only with use_sliding_window
    window_start: bool = False  # and from max_window_layers on
    full_every: int = 0  # each so many layers one without a window, where layer_types does not say it
    query_scale: str | None = None  # key of a number under whose root scores are divided, not the head size
    numbers: Mapping[str, str] = field(default_factory=dict)  # key of the config -> key of the metadata
    caps: Mapping[str, str] = field(default_factory=dict)  # the same for caps, which may be missing
    skips_rope: bool = False  # no_rope_layers says which layers turn nothing
    fused: Mapping[str, tuple[tuple[str, str], ...]] = field(
        default_factory=dict
    )  # module -> (module, rows) that lie in it one below the other
    experts: Experts | None = None


def _block(
    norms: tuple[str, str, str, str], mlp: Mapping[str, Sizes], head_norms: tuple[Sizes, Sizes] | None = None
) -> dict[str, Sizes]:
    """Attention and an MLP; `norms`: before and after each of them ("" for none)."""
    before, after, before_mlp, after_mlp = norms
    parts: dict[str, Sizes] = {before: ("hidden",), **SELF_ATTENTION}
    if head_norms:
        parts |= dict(zip(("self_attn.q_norm", "self_attn.k_norm"), head_norms, strict=True))
    parts |= {after: ("hidden",), before_mlp: ("hidden",), **mlp, after_mlp: ("hidden",)}
    return {name: sizes for name, sizes in parts.items() if name}


SELF_ATTENTION: Mapping[str, Sizes] = {
    ATTENTION[0]: ("queries", "hidden"),
    ATTENTION[1]: ("keys", "hidden"),
    ATTENTION[2]: ("keys", "hidden"),
    ATTENTION[3]: ("hidden", "queries"),
}
GATED: Mapping[str, Sizes] = {MLP[0]: ("ffn", "hidden"), MLP[1]: ("ffn", "hidden"), MLP[2]: ("hidden", "ffn")}
HEADS = (("head",), ("head",))
PRE = ("input_layernorm", "", "post_attention_layernorm", "")  # norms before attention and MLP
GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
POST = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")

COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
QWEN = {**COMMON, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
GEMMA = {
    **COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "num_key_value_heads": 4,
}
GEMMA_CAPS = {
    "attn_logit_softcapping": Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
    "final_logit_softcapping": Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            graphs=(graphs.LLAMA,),
            block=_block(PRE, GATED),
            defaults={**COMMON, "max_position_embeddings": 2048},
            biases=BIASES,
        ),
        "MistralForCausalLM": Family(
            graphs=(graphs.LLAMA, graphs.WINDOWED),
            block=_block(PRE, GATED),
            defaults={
                **COMMON,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        "Qwen2ForCausalLM": Family(
            graphs=(graphs.QWEN2, graphs.LLAMA, graphs.WINDOWED),
            block=_block(PRE, GATED),
            defaults={**QWEN, "num_key_value_heads": 32},
            fixed_biases=ATTENTION[:3],
            window_switch=True,
            window_start=True,
        ),
        "Qwen3ForCausalLM": Family(
            graphs=(graphs.QWEN3,),
            block=_block(PRE, GATED, HEADS),
            defaults={**QWEN, "num_key_value_heads": 32, "head_dim": 128},
            biases={"attention_bias": ATTENTION},
            window_switch=True,
            window_start=True,
        ),
        "Gemma2ForCausalLM": Family(
            graphs=(graphs.GEMMA2,),
            block=_block(GEMMA_NORMS, GATED),
            defaults={
                **GEMMA,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            biases={"attention_bias": ATTENTION},
            activation=("hidden_activation", TANH_GELU),
            norm_offset=1.0,
            full_every=2,
            query_scale="query_pre_attn_scalar",
            caps=GEMMA_CAPS,
        ),
        "Gemma3ForCausalLM": Family(
            graphs=(graphs.GEMMA3,),
            block=_block(GEMMA_NORMS, GATED, HEADS),
            defaults={
                **GEMMA,
                "max_position_embeddings": 131072,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            biases={"attention_bias": ATTENTION},
            activation=("hidden_activation", TANH_GELU),
            norm_offset=1.0,
            full_every=6,
            query_scale="query_pre_attn_scalar",
            caps=GEMMA_CAPS,
        ),
        "Phi3ForCausalLM": Family(
            graphs=(graphs.PHI3, graphs.LLAMA, graphs.WINDOWED),
            block={
                "input_layernorm": ("hidden",),
                "self_attn.qkv_proj": ("qkv", "hidden"),
                ATTENTION[3]: ("hidden", "queries"),
                "post_attention_layernorm": ("hidden",),
                "mlp.gate_up_proj": ("gate_up", "hidden"),
                MLP[2]: ("hidden", "ffn"),
            },
            defaults={
                **COMMON,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
            },
            fused={
                "self_attn.qkv_proj": (
                    (ATTENTION[0], "queries"),
                    (ATTENTION[1], "keys"),
                    (ATTENTION[2], "keys"),
                ),
                "mlp.gate_up_proj": ((MLP[0], "ffn"), (MLP[1], "ffn")),
            },
        ),
        "SmolLM3ForCausalLM": Family(
            graphs=(graphs.SMOLLM3, graphs.WINDOWED),
            block=_block(PRE, GATED),
            defaults={
                **COMMON,
                "tie_word_embeddings": True,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
            },
            biases=BIASES,
            window_switch=True,
            skips_rope=True,
        ),
        "Olmo2ForCausalLM": Family(
            graphs=(graphs.OLMO2,),
            block=_block(POST, GATED, (("queries",), ("keys",))),
            defaults={**COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
            biases={"attention_bias": ATTENTION},
        ),
        "GraniteForCausalLM": Family(
            graphs=(graphs.GRANITE,),
            block=_block(PRE, GATED),
            defaults={
                **COMMON,
                "max_position_embeddings": 2048,
                "embedding_multiplier": 1.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
            },
            biases=BIASES,
            numbers={
                "embedding_multiplier": Keys.LLM.EMBEDDING_SCALE,
                "logits_scaling": Keys.LLM.LOGIT_SCALE,
                "residual_multiplier": Keys.LLM.RESIDUAL_SCALE,
                "attention_multiplier": Keys.Attention.SCALE,
            },
        ),
        "Starcoder2ForCausalLM": Family(
            graphs=(graphs.STARCODER2,),
            block=_block(PRE, {"mlp.c_fc": ("ffn", "hidden"), "mlp.c_proj": ("hidden", "ffn")}),
            defaults={
                "norm_epsilon": 1e-5,
                "hidden_act": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
                "max_position_embeddings": 4096,
                "num_key_value_heads": 2,
                "use_bias": True,
            },
            biases={"use_bias": (*ATTENTION, "mlp.c_fc", "mlp.c_proj")},
            activation=("hidden_act", TANH_GELU),
            norm_epsilon="norm_epsilon",
            layer_norm=True,
        ),
        "Qwen3MoeForCausalLM": Family(
            graphs=(graphs.QWEN3_MOE, graphs.FREE_MOE),
            block=_block(
                PRE,
                {
                    "mlp.gate": ("experts", "hidden"),
                    "mlp.experts.{}.gate_proj": ("experts", "expert", "hidden"),
                    "mlp.experts.{}.up_proj": ("experts", "expert", "hidden"),
                    "mlp.experts.{}.down_proj": ("experts", "hidden", "expert"),
                },
                HEADS,
            ),
            dense_block=_block(PRE, GATED, HEADS),
            defaults={
                **QWEN,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            biases={"attention_bias": ATTENTION},
            window_switch=True,
            experts=Experts(
                count=("num_local_experts", "num_experts"),
                used="num_experts_per_tok",
                width="moe_intermediate_size",
            ),
        ),
        "MixtralForCausalLM": Family(
            graphs=(graphs.LLAMA,),
            block=_block(
                PRE,
                {
                    "block_sparse_moe.gate": ("experts", "hidden"),
                    "block_sparse_moe.experts.{}.w1": ("experts", "expert", "hidden"),
                    "block_sparse_moe.experts.{}.w3": ("experts", "expert", "hidden"),
                    "block_sparse_moe.experts.{}.w2": ("experts", "hidden", "expert"),
                },
            ),
            defaults={
                **COMMON,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "rope_theta": 1e6,
            },
            experts=Experts(
                count=("num_local_experts",), used="num_experts_per_tok", width="intermediate_size"
            ),
        ),
    }
)


def family_of(architecture: str) -> Family:
    if family := FAMILIES.get(architecture):
        return family
    raise UnsupportedArchitecture(
        f"config.json: architecture {architecture!r:.80} is not supported (known: {', '.join(FAMILIES)})"
    )
