"""The architectures that the methods quantize, as data. A new one is one row.

Names are those of the checkpoint, which are transformers' module paths. What llama.cpp needs to know of the
same architectures is in quant.gguf.families.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from quant.errors import BadSource, UnsupportedArchitecture

MOST_EXPERTS = 1024


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
class Experts:
    """A mixture of gated MLPs, under the names of the checkpoint."""

    mixture: str  # the module that holds the router and the experts
    count: tuple[str, ...]  # keys of the config; the first that is there
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        return f"{self.mixture}.gate"

    def linears(self, count: int) -> Iterator[tuple[str, ...]]:
        """Those that share an input, expert by expert."""
        for number in range(count):
            expert = f"{self.mixture}.experts.{number}"
            yield f"{expert}.{self.gate}", f"{expert}.{self.up}"
            yield (f"{expert}.{self.down}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row. Names of linears and norms are below a block, the others below the root."""

    package: str  # transformers' module with the classes
    prefix: str  # of the classes: LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding
    shared_inputs: tuple[tuple[str, ...], ...]  # linears that read the same input, in order of computation
    scale_groups: tuple[ScaleGroup, ...]
    window: Literal["none", "all", "typed"]  # which layers have one; typed: see layer_types
    unclipped: frozenset[str]  # linears whose output goes through a softmax: clipping weights hurts them
    config: str = ""  # prefix of the config's class where it is another
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager where scores are capped
    rotary: Literal["one", "typed"] = "one"  # typed: layers of each type turn positions in their own way
    norm_offset: float = 0.0  # what is added to a norm's weight
    norm_bias: bool = False
    embedding_scale: Literal["none", "root", "multiplier"] = "none"  # root: of the hidden size
    experts: Experts | None = None
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """In the order of computation."""
        return tuple(name for group in self.shared_inputs for name in group)

    def of(self, config: Mapping[str, Any]) -> "Family":
        """The same with all the experts that a config.json names; they are neither rescaled nor clipped.

        Raises BadSource.
        """
        if self.experts is None:
            return self
        count = next((config[key] for key in self.experts.count if key in config), None)
        if type(count) is not int or not 0 < count <= MOST_EXPERTS:
            raise BadSource(
                f"config.json: {self.experts.count[0]} must be 1 to {MOST_EXPERTS}, not {count!r:.40}"
            )
        groups = tuple(self.experts.linears(count))
        return replace(
            self,
            shared_inputs=(*self.shared_inputs, *groups),
            unclipped=self.unclipped.union(*groups),
        )

    def block_name(self, index: int) -> str:
        return f"{self.blocks}.{index}"


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


Window = Literal["none", "all", "typed"]
V_TO_O = ScaleGroup(
    source="self_attn.v_proj",
    linears=("self_attn.o_proj",),
    module="self_attn.o_proj",
    per_head="self_attn",
)
UP_TO_DOWN = ScaleGroup(source="mlp.up_proj", linears=("mlp.down_proj",), module="mlp.down_proj")


def _llama_like(
    package: str,
    prefix: str,
    window: Window,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    **more: Any,
) -> Family:
    """Blocks of rotary attention and a gated MLP under Llama's names; `norms` before each of them, if any."""
    before = [
        ScaleGroup(source=norm, linears=linears, module=module)
        for norm, linears, module in zip(norms, (QKV, GATED), ("self_attn", "mlp"), strict=False)
    ]
    groups = (*before[:1], V_TO_O, *before[1:], UP_TO_DOWN)
    return Family(
        package=f"transformers.models.{package}.modeling_{package}",
        prefix=prefix,
        shared_inputs=(QKV, ("self_attn.o_proj",), GATED, ("mlp.down_proj",)),
        scale_groups=groups,
        window=window,
        unclipped=frozenset(QKV[:2]),
        **more,
    )


def _mixture(package: str, prefix: str, experts: Experts) -> Family:
    return Family(
        package=f"transformers.models.{package}.modeling_{package}",
        prefix=prefix,
        shared_inputs=(QKV, ("self_attn.o_proj",)),
        scale_groups=(ScaleGroup(source="input_layernorm", linears=QKV, module="self_attn"), V_TO_O),
        window="all",
        unclipped=frozenset(QKV[:2]),
        experts=experts,
    )


def _gemma(package: str, prefix: str, **more: Any) -> Family:
    return _llama_like(
        package,
        prefix,
        "typed",
        ("input_layernorm", "pre_feedforward_layernorm"),
        norm_offset=1.0,
        embedding_scale="root",
        **more,
    )


# Its queries, keys and values are one linear, and so are gate and up: no channel of v or up is rescaled.
PHI3 = Family(
    package="transformers.models.phi3.modeling_phi3",
    prefix="Phi3",
    shared_inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    scale_groups=(
        ScaleGroup(source="input_layernorm", linears=("self_attn.qkv_proj",), module="self_attn"),
        ScaleGroup(source="post_attention_layernorm", linears=("mlp.gate_up_proj",), module="mlp"),
    ),
    window="all",
    unclipped=frozenset({"self_attn.qkv_proj"}),
)
STARCODER2 = Family(
    package="transformers.models.starcoder2.modeling_starcoder2",
    prefix="Starcoder2",
    shared_inputs=(QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    scale_groups=(
        ScaleGroup(source="input_layernorm", linears=QKV, module="self_attn"),
        V_TO_O,
        ScaleGroup(source="post_attention_layernorm", linears=("mlp.c_fc",), module="mlp"),
    ),
    window="all",
    unclipped=frozenset(QKV[:2]),
    norm_bias=True,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama_like("llama", "Llama", "none"),
        "MistralForCausalLM": _llama_like("mistral", "Mistral", "all"),
        "Qwen2ForCausalLM": _llama_like("qwen2", "Qwen2", "typed"),
        "Qwen3ForCausalLM": _llama_like("qwen3", "Qwen3", "typed"),
        "Gemma2ForCausalLM": _gemma("gemma2", "Gemma2", attention="eager"),
        "Gemma3ForCausalLM": _gemma(
            "gemma3", "Gemma3", config="Gemma3Text", attention="eager", rotary="typed"
        ),
        "Phi3ForCausalLM": PHI3,
        "SmolLM3ForCausalLM": _llama_like("smollm3", "SmolLM3", "typed"),
        "Olmo2ForCausalLM": _llama_like("olmo2", "Olmo2", "none", norms=()),
        "GraniteForCausalLM": _llama_like("granite", "Granite", "none", embedding_scale="multiplier"),
        "Starcoder2ForCausalLM": STARCODER2,
        "Qwen3MoeForCausalLM": _mixture(
            "qwen3_moe",
            "Qwen3Moe",
            Experts(
                mixture="mlp",
                count=("num_local_experts", "num_experts"),
                gate="gate_proj",
                up="up_proj",
                down="down_proj",
            ),
        ),
        "MixtralForCausalLM": _mixture(
            "mixtral",
            "Mixtral",
            Experts(mixture="block_sparse_moe", count=("num_local_experts",), gate="w1", up="w3", down="w2"),
        ),
    }
)


def family_of(architecture: str) -> Family:
    if family := FAMILIES.get(architecture):
        return family
    raise UnsupportedArchitecture(
        f"config.json: architecture {architecture!r:.80} is not supported (known: {', '.join(FAMILIES)})"
    )
