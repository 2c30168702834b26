"""Presets of llama.cpp's types, for checkpoints and for GGUF files that can still be quantized."""

from collections.abc import Iterator, Mapping
from math import inf
from types import MappingProxyType

from quant.build_plan import GGUF_BYTES_A_SECOND
from quant.gguf.mixture import row_bytes, tensor_type
from quant.plan import REQUANTIZABLE
from quant.recommend.facts import Facts
from quant.recommend.needs import CUDA_BYTES, Need, Option

RUNTIME_BYTES = 96 << 20  # the engine process without a model
LOGIT_BYTES = 64 << 20
STEP_TOKENS = 512

# Mean KL divergence of chat-34m (34 million parameters) from its source, without imatrix. Larger models lose
# less: what counts is the order, and the proportions.
LOSS: Mapping[str, float] = MappingProxyType(
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


def gguf_options(facts: Facts, need: Need) -> Iterator[Option]:
    """A file that is quantized already is the one option there is."""
    if facts.stored is None or facts.stored in REQUANTIZABLE:
        yield from (_built(facts, need, preset) for preset in LOSS if preset != facts.stored)
    if facts.stored is not None:
        yield _as_it_is(facts, need)


def _as_it_is(facts: Facts, need: Need) -> Option:
    assert facts.stored is not None
    loss = 0.0 if facts.stored in {"f32", "f16", "bf16"} else LOSS.get(facts.stored, inf)
    return Option(
        preset=facts.stored,
        format="gguf",
        codes=facts.stored_bytes,
        scales=0,
        kept=0,
        kv=facts.kv(need),
        overhead=_overhead(facts, need),
        loss=loss,
        build="the source as it is",
    )


def _built(facts: Facts, need: Need, preset: str) -> Option:
    types = {
        name: tensor_type(preset, name, columns, facts.stack) for name, (_, columns) in facts.weights.items()
    }
    packed = sum(rows * row_bytes(types[name], columns) for name, (rows, columns) in facts.weights.items())
    bits = sum(rows * columns * _CODE_BITS[types[name]] for name, (rows, columns) in facts.weights.items())
    seconds = 2 * facts.parameters / GGUF_BYTES_A_SECOND
    return Option(
        preset=preset,
        format="gguf",
        codes=bits // 8,
        scales=packed - bits // 8,
        kept=4 * facts.vectors,
        kv=facts.kv(need),
        overhead=_overhead(facts, need),
        loss=LOSS[preset],
        build=f"no calibration, about {seconds:,.0f} s, {2 * facts.parameters / 1e6:,.0f} MB of scratch",
        fallen_back=sum(1 for _ in _fallen(facts, preset)),
    )


def _overhead(facts: Facts, need: Need) -> int:
    """The process (or what it takes of a GPU), one step's activations and its logits."""
    runtime = CUDA_BYTES if need.device == "cuda" else RUNTIME_BYTES
    step = 4 * STEP_TOKENS * (4 * facts.hidden + 3 * facts.ffn)
    return runtime + step + min(LOGIT_BYTES, 4 * STEP_TOKENS * facts.vocabulary)


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
