"""Which GGUF presets fit a device, in which order, with the arithmetic. Pure: numbers in, numbers out.

A task says how far from its source a variant may be. Presets that are near enough come first, smallest first
(decoding is bound by bytes read); after them those that are not, nearest first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadRecipe, BadSource
from quant.gguf.layout import HEAD, Copied, plan
from quant.gguf.mixture import Stack, row_bytes, tensor_type
from quant.gguf.shape import read_shape
from quant.source import Source

KV_BYTES = 2  # of a number: 16-bit floats
RUNTIME_BYTES = 96 << 20  # the engine process without a model
LOGIT_BYTES = 64 << 20
STEP_TOKENS = 512

# Mean KL divergence (nats a token) of a 34-million-parameter model from its source, as llama.cpp's own
# quantizer gave it before this table was written, not measured by this code; the order
# and the proportions count, larger models lose less.
GGUF_LOSS: Mapping[str, float] = MappingProxyType(
    {
        "q8_0": 0.0012,
        "q6_k": 0.0074,
        "q5_k_m": 0.019,
        "q4_k_m": 0.0689,
        "q4_0": 0.1161,
        "q3_k_m": 0.1899,
        "q2_k": 0.9591,
    }
)
# Most loss by the same measure that a task bears.
TASKS: Mapping[str, float] = MappingProxyType({"chat": 0.07, "code": 0.02, "extract": 0.008, "draft": 0.2})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What counts of a model. Weights by GGUF's names, as (rows, columns)."""

    weights: Mapping[str, tuple[int, int]]
    vectors: int  # numbers in norms and biases, which stay 32-bit
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocabulary: int
    context: int
    stack: Stack

    @property
    def parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.weights.values()) + self.vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    memory: int  # bytes of the device
    context: int  # tokens of one request
    parallel: int
    task: str = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One preset; bytes throughout."""

    preset: str
    codes: int
    scales: int
    vectors: int
    kv: int
    overhead: int
    loss: float
    near_enough: bool
    fits: bool
    fallen_back: int  # weights whose rows fit no block of their type
    build: str

    @property
    def weights(self) -> int:
        return self.codes + self.scales + self.vectors

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.overhead


def read_facts(source: Source) -> Facts:
    """From headers and config.json. Raises BadSource."""
    if source.kind != "hf":
        raise BadSource("a recommendation needs a checkpoint: presets are made from one")
    shape, tensors = read_shape(source.architecture, source.config), checkpoint_tensors(source.path)
    if shape.experts_used:
        raise BadSource("a recommendation needs a dense model: sizes of mixtures of experts are not tabled")
    planned = [
        tensor
        for tensor in plan(shape, tensors, with_head=not shape.tied and HEAD in tensors)
        if isinstance(tensor, Copied)
    ]
    return Facts(
        weights={one.name: (one.shape[0], one.shape[1]) for one in planned if len(one.shape) == 2},
        vectors=sum(one.shape[0] for one in planned if len(one.shape) == 1),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden,
        ffn=shape.ffn,
        vocabulary=shape.vocab,
        context=shape.context,
        stack=Stack(layers=shape.layers, shared_heads=shape.heads // shape.kv_heads, tied=shape.tied),
    )


def recommend(facts: Facts, need: Need) -> tuple[Option, ...]:
    """Best first, those that do not fit last. Raises BadRecipe for an unknown task or too long a context."""
    if need.task not in TASKS:
        raise BadRecipe(f"no task {need.task!r:.40}; known: {', '.join(TASKS)}")
    if need.context > facts.context:
        raise BadRecipe(f"a context of {need.context:,} tokens; the model's is {facts.context:,}")
    options = [_option(facts, need, preset, loss) for preset, loss in GGUF_LOSS.items()]
    return tuple(sorted(options, key=_order))


def _order(option: Option) -> tuple[bool, bool, float]:
    return not option.fits, not option.near_enough, option.total if option.near_enough else option.loss


def _option(facts: Facts, need: Need, preset: str, loss: float) -> Option:
    types = {
        name: tensor_type(preset, name, columns, facts.stack) for name, (_, columns) in facts.weights.items()
    }
    packed = sum(rows * row_bytes(types[name], columns) for name, (rows, columns) in facts.weights.items())
    codes = (
        sum(rows * columns * _CODE_BITS[types[name]] for name, (rows, columns) in facts.weights.items()) // 8
    )
    kv = 2 * facts.layers * facts.kv_heads * facts.head_dim * KV_BYTES * need.context * need.parallel
    overhead = _overhead(facts)
    total = packed + 4 * facts.vectors + kv + overhead
    return Option(
        preset=preset,
        codes=codes,
        scales=packed - codes,
        vectors=4 * facts.vectors,
        kv=kv,
        overhead=overhead,
        loss=loss,
        near_enough=loss <= TASKS[need.task],
        fits=total <= need.memory,
        fallen_back=sum(1 for _ in _fallen(facts, preset)),
        build=f"to build: no calibration, {2 * facts.parameters / 1e6:,.0f} MB of scratch",
    )


def _overhead(facts: Facts) -> int:
    """The process, one step's activations and its logits."""
    step = 4 * STEP_TOKENS * (4 * facts.hidden + 3 * facts.ffn)
    return RUNTIME_BYTES + step + min(LOGIT_BYTES, 4 * STEP_TOKENS * facts.vocabulary)


def _fallen(facts: Facts, preset: str) -> Iterator[str]:
    """Weights that a width of whole blocks would store in another type."""
    for name, (_, columns) in facts.weights.items():
        if tensor_type(preset, name, columns, facts.stack) != tensor_type(preset, name, 256, facts.stack):
            yield name


_CODE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "q2_k": 2,
        "q3_k": 3,
        **dict.fromkeys(("q4_0", "q4_1", "q4_k", "iq4_nl", "iq4_xs"), 4),
        **dict.fromkeys(("q5_0", "q5_1", "q5_k"), 5),
        "q6_k": 6,
        "q8_0": 8,
        **dict.fromkeys(("f16", "bf16"), 16),
    }
)
