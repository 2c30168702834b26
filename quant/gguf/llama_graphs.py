"""llama.cpp's models (src/models/*.cpp) that compute our architectures, as data: what each of them can do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import Keys

STANDARD_WINDOW = 4096  # tokens
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# What a checkpoint may ask for and not every graph has.
FREE_HEAD = "a head size other than hidden_size / num_attention_heads"
FACTORS = "this kind of rope scaling"
LONG = "longrope"
PARTIAL = "partial rotary embeddings"
LOCAL = "a rope of its own for windowed layers"
NO_ROPE = "layers without rotary embeddings other than every fourth"
WINDOW = f"a sliding window below {STANDARD_WINDOW:,} tokens"
SCORE_CAP = "a cap on attention scores"
OWN_HEAD = "an output matrix other than the embedding"
UNNORMALIZED = "expert weights that do not add up to 1"
DENSE = "layers without experts"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One of llama.cpp's models and what it can compute."""

    arch: str  # general.architecture
    rotates_neighbours: (
        bool  # pairs (2i, 2i+1); transformers rotates (i, i + d/2), so q and k rows are reordered
    )
    biases: frozenset[str] = frozenset()  # linears that may have one
    abilities: frozenset[str] = frozenset({OWN_HEAD})
    windowed: bool = False  # its files always say which layers have a window
    fused: bool = False  # takes Phi-3's fused matrices as they are
    sinks: bool = False  # wants attention sinks, which are written as "none"
    wants_biases: bool = False  # zeros are written where the checkpoint has none
    wants_head: bool = False  # an output matrix is written even where it is the embedding
    shares_expert: bool = False  # wants an expert for all tokens and the choice of others told: it is zeros
    named_like: str = "llama"  # architecture in gguf's table of names, for those that are not in it
    numbers: Mapping[str, float] = field(default_factory=dict)  # metadata that it wants from everybody
    names: Mapping[str, str] = field(default_factory=dict)  # of modules for which gguf's table has another


LLAMA = Graph(
    arch="llama",
    rotates_neighbours=True,
    biases=frozenset(ATTENTION + MLP),
    abilities=frozenset({FREE_HEAD, FACTORS, LONG, OWN_HEAD}),
)
# The one graph that is Llama's with windowed layers.
WINDOWED = Graph(
    arch="granite_swa",
    rotates_neighbours=True,
    biases=LLAMA.biases,
    abilities=LLAMA.abilities | {WINDOW, NO_ROPE},
    windowed=True,
    sinks=True,
    numbers={Keys.LLM.LOGIT_SCALE: 1.0},
)
GRANITE = Graph(arch="granite", rotates_neighbours=True, biases=LLAMA.biases, abilities=LLAMA.abilities)
QWEN2 = Graph(arch="qwen2", rotates_neighbours=False, biases=frozenset(ATTENTION[:3]))
QWEN3 = Graph(
    arch="qwen3",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, OWN_HEAD}),
)
GEMMA2 = Graph(
    arch="gemma2",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, WINDOW, SCORE_CAP}),
    windowed=True,
)
GEMMA3 = Graph(
    arch="gemma3",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, WINDOW, OWN_HEAD, LOCAL}),
    windowed=True,
)
PHI3 = Graph(
    arch="phi3",
    rotates_neighbours=False,
    abilities=frozenset({LONG, PARTIAL, OWN_HEAD}),
    fused=True,
)
SMOLLM3 = Graph(
    arch="smollm3",
    rotates_neighbours=True,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, OWN_HEAD}),
)
OLMO2 = Graph(arch="olmo2", rotates_neighbours=False, biases=frozenset(ATTENTION[:3]), wants_head=True)
STARCODER2 = Graph(
    arch="starcoder2",
    rotates_neighbours=False,
    biases=frozenset({*ATTENTION, "mlp.c_fc", "mlp.c_proj"}),
    wants_biases=True,
)
QWEN3_MOE = Graph(
    arch="qwen3moe",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, OWN_HEAD}),
)
# Qwen3's attention over experts whose weights stay as the router gives them, or over layers without experts.
FREE_MOE = Graph(
    arch="hy_v3",
    rotates_neighbours=False,
    biases=frozenset(ATTENTION[:3]),
    abilities=frozenset({FREE_HEAD, OWN_HEAD, UNNORMALIZED, DENSE}),
    shares_expert=True,
    named_like="glm4moe",
    names={"post_attention_layernorm": "ffn_norm"},
)
