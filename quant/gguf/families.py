"""The architectures we convert, as data: what configs leave out, which llama.cpp graph computes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from quant.errors import BadSource, UnsupportedArchitecture
from quant.gguf.fields import Fields
from quant.gguf.rope import Rope, read_rope

MOST_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp aborts above it
STANDARD_WINDOW = 4096  # tokens
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One of llama.cpp's models (src/models/*.cpp) and what it can compute."""

    arch: str  # general.architecture
    rotates_neighbours: (
        bool  # pairs (2i, 2i+1); transformers rotates (i, i + d/2), so q and k rows are reordered
    )
    biases: frozenset[str]
    abilities: frozenset[str] = frozenset()


FREE_HEAD = "a head size other than hidden_size / num_attention_heads"
FACTORS = "this kind of rope scaling"
WINDOW = f"a sliding window below {STANDARD_WINDOW:,} tokens"

LLAMA = Graph(
    arch="llama",
    rotates_neighbours=True,
    biases=frozenset(ATTENTION + MLP),
    abilities=frozenset({FREE_HEAD, FACTORS}),
)
# The one graph that is Llama's with windowed layers. It wants attention sinks, which are written as "none".
WINDOWED = Graph(
    arch="granite_swa",
    rotates_neighbours=True,
    biases=LLAMA.biases,
    abilities=LLAMA.abilities | {WINDOW},
)
QWEN2 = Graph(arch="qwen2", rotates_neighbours=False, biases=frozenset(ATTENTION[:3]))
QWEN3 = Graph(
    arch="qwen3",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD}),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: a transformers class."""

    graphs: tuple[Graph, ...]  # the first that can compute the checkpoint is used
    defaults: Mapping[str, Any]  # of the class, for keys that older configs leave out
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # key of the config -> linears with a bias
    fixed_biases: tuple[str, ...] = ()
    qk_norm: bool = False
    window_switch: bool = False  # the window counts only with use_sliding_window, from max_window_layers on


COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
QWEN = {**COMMON, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            graphs=(LLAMA,),
            defaults={**COMMON, "max_position_embeddings": 2048},
            biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
        ),
        "MistralForCausalLM": Family(
            graphs=(LLAMA, WINDOWED),
            defaults={
                **COMMON,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        "Qwen2ForCausalLM": Family(
            graphs=(QWEN2, LLAMA, WINDOWED),
            defaults={**QWEN, "num_key_value_heads": 32},
            fixed_biases=ATTENTION[:3],
            window_switch=True,
        ),
        "Qwen3ForCausalLM": Family(
            graphs=(QWEN3,),
            defaults={**QWEN, "num_key_value_heads": 32, "head_dim": 128},
            biases={"attention_bias": ATTENTION},
            qk_norm=True,
            window_switch=True,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A checkpoint's hyperparameters, checked, and the graph that computes it."""

    graph: Graph
    architecture: str  # transformers' class
    vocab: int  # rows of the embedding
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms_eps: float
    tied: bool
    rope: Rope
    biases: frozenset[str]  # linears that have one
    qk_norm: bool
    window: int | None  # tokens that a windowed layer looks back on; None: all layers see everything
    windowed: tuple[bool, ...] = ()  # by layer


def family_of(architecture: str) -> Family:
    if family := FAMILIES.get(architecture):
        return family
    raise UnsupportedArchitecture(
        f"architecture {architecture!r:.80} is not supported (known: {', '.join(FAMILIES)})"
    )


def read_shape(architecture: str, values: Mapping[str, Any]) -> Shape:
    """Raises UnsupportedArchitecture or BadSource; touches no file."""
    family = family_of(architecture)
    config = Fields(values, family.defaults)
    _refuse_foreign(config)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    head_dim = config.integer("head_dim") if config.has("head_dim") else hidden // heads
    context = config.integer("max_position_embeddings")
    rope = read_rope(config, head_dim, context)
    biases = frozenset(family.fixed_biases).union(
        *(linears for key, linears in family.biases.items() if config.flag(key))
    )
    layers = config.integer("num_hidden_layers")
    window, windowed = _window(config, family, layers, context)
    needs = {
        FREE_HEAD: head_dim * heads != hidden,
        FACTORS: bool(rope.factors),
        WINDOW: window is not None and window < STANDARD_WINDOW,
    }
    graph = _choose(architecture, family, frozenset(need for need, there in needs.items() if there), biases)
    if window is not None and WINDOW not in graph.abilities:
        context, window, windowed = window, None, ()  # within the window, windowed and full attention are one
    shape = Shape(
        graph=graph,
        architecture=architecture,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        ffn=config.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads") if config.has("num_key_value_heads") else heads,
        head_dim=head_dim,
        context=context,
        rms_eps=config.number("rms_norm_eps"),
        tied=config.flag("tie_word_embeddings"),
        rope=rope,
        biases=biases,
        qk_norm=family.qk_norm,
        window=window,
        windowed=windowed,
    )
    _check(shape)
    return shape


def _refuse_foreign(config: Fields) -> None:
    if config.has("quantization_config"):
        raise BadSource("config.json has a quantization_config: name the full-precision checkpoint instead")
    if (activation := config.text("hidden_act")) not in {"silu", "swish"}:
        raise BadSource(f"config.json: hidden_act {activation!r:.80} is not supported for this architecture")


def _window(config: Fields, family: Family, layers: int, context: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens and the layers that have it; (None, ()) where it never hides a token."""
    if not config.has("sliding_window") or (family.window_switch and not config.flag("use_sliding_window")):
        return None, ()
    window = config.integer("sliding_window")
    windowed = tuple(True for _ in range(layers))
    if family.window_switch and config.has("layer_types"):
        windowed = tuple(kind == "sliding_attention" for kind in config.words("layer_types"))
    elif family.window_switch:
        start = config.integer("max_window_layers")
        windowed = tuple(layer >= start for layer in range(layers))
    return (window, windowed) if window < context and any(windowed) else (None, ())


def _choose(architecture: str, family: Family, needs: frozenset[str], biases: frozenset[str]) -> Graph:
    for graph in family.graphs:
        if needs <= graph.abilities and biases <= graph.biases:
            return graph
    best = family.graphs[0]
    missing = sorted(needs - best.abilities) + [f"a bias in {name}" for name in sorted(biases - best.biases)]
    raise BadSource(f"llama.cpp cannot compute {architecture} with {' and '.join(missing)}")


def _check(shape: Shape) -> None:
    if shape.heads % shape.kv_heads:
        raise BadSource("config.json: num_attention_heads must be a multiple of num_key_value_heads")
    if shape.head_dim % 2:
        raise BadSource(f"config.json: the head size must be even, not {shape.head_dim}")
    if shape.layers > MOST_LAYERS:
        raise BadSource(f"config.json: {shape.layers:,} layers are more than llama.cpp's {MOST_LAYERS}")
    if shape.windowed and len(shape.windowed) != shape.layers:
        raise BadSource("config.json: layer_types must name each layer")
