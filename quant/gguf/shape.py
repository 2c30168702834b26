"""A checkpoint's hyperparameters, checked against what its class and llama.cpp's graphs can compute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import Keys

from quant.errors import BadSource
from quant.gguf import llama_graphs as graphs
from quant.gguf.families import Family, family_of
from quant.gguf.fields import Fields
from quant.gguf.llama_graphs import STANDARD_WINDOW, Graph
from quant.gguf.rope import Rope, read_local_rope, read_rope

MOST_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp aborts above it
STEP = 4  # SmolLM3's graph leaves each fourth layer unturned
UNCAPPED = 1e6  # a cap this high changes no float32; Gemma 2's graph always has one
SQUARE_HEADED = {"gemma2": 46, "gemma3": 62}  # layers of 27B models, whose queries llama.cpp scales otherwise


@dataclass(frozen=True, kw_only=True)
class Shape:
    graph: Graph
    family: Family
    architecture: str  # transformers' class
    sizes: Mapping[str, int]  # by the names that a family's block uses
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    epsilon: float  # of the norms
    tied: bool
    rope: Rope
    biases: frozenset[str]  # linears that have one
    window: int | None  # tokens that a windowed layer looks back on; None: all layers see everything
    windowed: tuple[bool, ...] = ()  # by layer
    turned: tuple[bool, ...] = ()  # by layer, whether positions turn it; empty: as the graph does
    local_theta: float | None = None  # rope of windowed layers
    query_factor: float = 1.0  # by which scores are too small in llama.cpp
    numbers: Mapping[str, float] = field(default_factory=dict)  # metadata by key
    dense: frozenset[int] = frozenset()  # layers without experts
    experts_used: int = 0  # by a token; 0: no experts
    normalized: bool = True  # the weights of a token's experts add up to 1

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.sizes["vocab"]

    @property
    def hidden(self) -> int:
        return self.sizes["hidden"]

    @property
    def ffn(self) -> int:
        return self.sizes["ffn"]


def read_shape(architecture: str, values: Mapping[str, Any]) -> Shape:
    """Raises UnsupportedArchitecture or BadSource; touches no file."""
    family = family_of(architecture)
    config = Fields(values, family.defaults)
    _refuse_foreign(config, family)
    sizes, heads, kv_heads = _sizes(config, family)
    head_dim, layers = sizes["head"], config.integer("num_hidden_layers")
    context = config.integer("max_position_embeddings")
    rope = read_rope(config, head_dim, context)
    local = read_local_rope(config) if "rope_local_base_freq" in family.defaults else None
    biases = frozenset(family.fixed_biases).union(
        *(linears for key, linears in family.biases.items() if config.flag(key))
    )
    window, windowed = _window(config, family, layers, context)
    turned = _turned(config, layers) if family.skips_rope else ()
    normalized, dense = _experts(config, family, layers)
    numbers = {key: config.number(name) for name, key in family.numbers.items()}
    numbers |= {key: config.number(name) for name, key in family.caps.items() if config.has(name)}
    needs = {
        graphs.FREE_HEAD: head_dim * heads != sizes["hidden"],
        graphs.FACTORS: bool(rope.factors),
        graphs.LONG: bool(rope.long_factors),
        graphs.PARTIAL: rope.dimensions not in {None, head_dim},
        graphs.WINDOW: window is not None and window < STANDARD_WINDOW,
        graphs.NO_ROPE: turned != tuple((layer + 1) % STEP != 0 for layer in range(len(turned))),
        graphs.SCORE_CAP: Keys.LLM.ATTN_LOGIT_SOFTCAPPING in numbers,
        graphs.LOCAL: local is not None,
        graphs.UNNORMALIZED: not normalized,
        graphs.DENSE: bool(dense),
    }
    graph = _choose(architecture, family, frozenset(need for need, there in needs.items() if there), biases)
    if window is not None and graphs.WINDOW not in graph.abilities:
        context, window, windowed = window, None, ()  # within the window, windowed and full attention are one
    if window is None and graph.windowed:
        window, windowed = _unhiding(graph, windowed, layers, context)
    shape = Shape(
        graph=graph,
        family=family,
        architecture=architecture,
        sizes=sizes,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        epsilon=config.number(family.norm_epsilon),
        tied=config.flag("tie_word_embeddings"),
        rope=rope,
        biases=biases,
        window=window,
        windowed=windowed,
        turned=turned,
        local_theta=local,
        query_factor=_query_factor(config, family, graph, layers, sizes, heads),
        numbers={**graph.numbers, **_uncapped(family, graph), **numbers},
        dense=dense,
        experts_used=config.integer(family.experts.used) if family.experts else 0,
        normalized=normalized,
    )
    _check(shape)
    return shape


def _refuse_foreign(config: Fields, family: Family) -> None:
    if config.has("quantization_config"):
        raise BadSource("config.json has a quantization_config: name the full-precision checkpoint instead")
    key, known = family.activation
    if (activation := config.text(key)) not in known:
        raise BadSource(f"config.json: {key} {activation!r:.80} is not supported for this architecture")
    if config.flag("use_bidirectional_attention"):
        raise BadSource("config.json: use_bidirectional_attention is not supported")


def _sizes(config: Fields, family: Family) -> tuple[dict[str, int], int, int]:
    """(sizes by name, heads, KV heads)"""
    heads, hidden, ffn = (
        config.integer(key) for key in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    kv_heads = config.integer("num_key_value_heads") if config.has("num_key_value_heads") else heads
    head = config.integer("head_dim") if config.has("head_dim") else hidden // heads
    queries, keys = heads * head, kv_heads * head
    sizes = {"vocab": config.integer("vocab_size"), "hidden": hidden, "ffn": ffn, "head": head}
    sizes |= {"queries": queries, "keys": keys, "qkv": queries + 2 * keys, "gate_up": 2 * ffn}
    if experts := family.experts:
        count = next(key for key in experts.count if config.has(key))
        sizes |= {"experts": config.integer(count), "expert": config.integer(experts.width)}
    return sizes, heads, kv_heads


def _window(config: Fields, family: Family, layers: int, context: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens, None where it never hides a token, and the layers that have it."""
    windowed = _windowed(config, family, layers)
    if not config.has("sliding_window") or (family.window_switch and not config.flag("use_sliding_window")):
        return None, windowed if family.full_every else ()
    window = config.integer("sliding_window")
    if window < context and any(windowed):
        return window, windowed
    return None, windowed if family.full_every else ()


def _unhiding(
    graph: Graph, windowed: tuple[bool, ...], layers: int, context: int
) -> tuple[int | None, tuple[bool, ...]]:
    """A window that hides nothing, for a graph that always has one, and in some layer."""
    if any(windowed):
        return context, windowed
    return (None, ()) if graphs.LOCAL in graph.abilities else (context, (True,) * layers)


def _windowed(config: Fields, family: Family, layers: int) -> tuple[bool, ...]:
    if (family.window_switch or family.full_every) and config.has("layer_types"):
        return tuple(kind == "sliding_attention" for kind in config.words("layer_types"))
    if family.full_every:
        key = "sliding_window_pattern"
        every = config.integer(key) if config.has(key) else family.full_every
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if family.skips_rope:  # whatever is turned sees everything
        return tuple(not turned for turned in _turned(config, layers))
    start = config.integer("max_window_layers") if family.window_start else 0
    return tuple(layer >= start for layer in range(layers))


def _turned(config: Fields, layers: int) -> tuple[bool, ...]:
    if config.has("no_rope_layers"):
        found = config.bits("no_rope_layers")
        if len(found) != layers:
            raise BadSource("config.json: no_rope_layers must name each layer")
        return found
    key = "no_rope_layer_interval"
    every = config.integer(key) if config.has(key) else STEP
    return tuple((layer + 1) % every != 0 for layer in range(layers))


def _experts(config: Fields, family: Family, layers: int) -> tuple[bool, frozenset[int]]:
    """(whether weights are normalized, layers without experts)"""
    if family.experts is None:
        return True, frozenset()
    step = config.integer("decoder_sparse_step") if config.has("decoder_sparse_step") else 1
    plain = set(config.indices("mlp_only_layers")) if config.has("mlp_only_layers") else set()
    dense = frozenset(layer for layer in range(layers) if layer in plain or (layer + 1) % step)
    return config.flag("norm_topk_prob"), dense


def _query_factor(
    config: Fields, family: Family, graph: Graph, layers: int, sizes: Mapping[str, int], heads: int
) -> float:
    """By which queries must be larger than the checkpoint's, so that llama.cpp's scores are the model's."""
    if family.query_scale is None:
        return 1.0
    special = layers == SQUARE_HEADED.get(graph.arch)
    divisor = sizes["hidden"] // heads if special else sizes["head"]
    wanted = config.number(family.query_scale)
    return 1.0 if wanted == divisor else math.sqrt(divisor / wanted)


def _uncapped(family: Family, graph: Graph) -> dict[str, float]:
    """For a graph that always caps."""
    return dict.fromkeys(family.caps.values(), UNCAPPED) if graphs.SCORE_CAP in graph.abilities else {}


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
