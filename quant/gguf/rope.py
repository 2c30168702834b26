"""Rotary position embeddings: from a config's words to llama.cpp's keys.

The formulas are those of the papers as transformers computes them (modeling_rope_utils.py): linear
(arXiv 2306.15595), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753) and Llama 3.1's. llama.cpp knows the
others by name; frequencies like Llama 3.1's are a vector of factors by which it divides the plain ones
(rope_freqs.weight).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from quant.errors import BadSource
from quant.gguf.fields import Fields

BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's defaults; llama.cpp's graphs for these families know no others
WITH_ORIGINAL = frozenset({"llama3", "yarn", "longrope", "su"})  # types that name the context of pretraining


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles are position * theta^(-2i/d) / factors[i], then scaled as `scaling` says."""

    theta: float
    scaling: str | None = None  # llama.cpp's rope.scaling.type
    factor: float = 1.0
    original_context: int | None = None
    attention: float = 1.0  # multiplies cosine and sine on top of what `scaling` implies
    factors: tuple[float, ...] = ()  # dimensions / 2 of them, or none
    short_factors: tuple[float, ...] = ()  # of longrope, up to the original context
    long_factors: tuple[float, ...] = ()  # of longrope, in larger contexts
    dimensions: int | None = None  # of a head that are turned; None: all


def read_rope(config: Fields, head_dim: int, context: int) -> Rope:
    """Raises BadSource for a type of scaling that is not in the table."""
    table = config.table("rope_scaling") or config.table("rope_parameters")
    if config.has("rope_local_base_freq") and isinstance(full := table.get("full_attention"), Mapping):
        table = full
    given = {key: value for key, value in table.items() if value or value is False}  # 0 means "not given"
    if any(isinstance(value, Mapping) for value in given.values()):
        raise BadSource("config.json: rope parameters that differ between layers are not supported")
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in READERS:
        raise BadSource(
            f"config.json: rope scaling {kind!r:.80} is not supported (known: {', '.join(READERS)})"
        )
    theta = config.number("rope_theta") if config.has("rope_theta") else 10_000.0
    defaults = {"rope_theta": theta, "original_max_position_embeddings": context}
    if kind in WITH_ORIGINAL and config.has("original_max_position_embeddings"):
        given["original_max_position_embeddings"] = config.integer("original_max_position_embeddings")
    fields = Fields(given, defaults, "config.json: rope parameters")
    turned = int(head_dim * _rotated_share(config, fields))
    if turned != head_dim and (turned % 2 or not 0 < turned < head_dim):
        raise BadSource(f"config.json: partial_rotary_factor turns {turned} of a head's {head_dim} numbers")
    rope = READERS[kind](fields, turned, context)
    return rope if turned == head_dim else replace(rope, dimensions=turned)


def read_local_rope(config: Fields) -> float:
    """Theta of windowed layers, which Gemma 3 turns otherwise. Raises BadSource for any scaling of them."""
    table = config.table("rope_parameters").get("sliding_attention")
    local = Fields(table if isinstance(table, Mapping) else {}, {}, "config.json: rope parameters")
    if local.has("rope_type") and local.text("rope_type") != "default":
        raise BadSource("config.json: rope scaling of windowed layers is not supported")
    full = config.table("rope_parameters").get("full_attention") or config.table("rope_scaling")
    kind = full.get("rope_type", "default") if isinstance(full, Mapping) else "default"
    if kind not in {"default", "linear"}:  # llama.cpp would bend the windowed layers too
        raise BadSource(f"config.json: rope scaling {kind!r:.80} is not supported for this architecture")
    return local.number("rope_theta") if local.has("rope_theta") else config.number("rope_local_base_freq")


def _rotated_share(config: Fields, rope: Fields) -> float:
    for fields in (rope, config):
        if fields.has("partial_rotary_factor"):
            return fields.number("partial_rotary_factor")
    return 1.0


def _plain(rope: Fields, head_dim: int, context: int) -> Rope:
    return Rope(theta=rope.number("rope_theta"))


def _linear(rope: Fields, head_dim: int, context: int) -> Rope:
    return Rope(theta=rope.number("rope_theta"), scaling="linear", factor=rope.number("factor"))


def _llama3(rope: Fields, head_dim: int, context: int) -> Rope:
    theta, factor = rope.number("rope_theta"), rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = rope.integer("original_max_position_embeddings")
    if low == high:
        raise BadSource("config.json: rope parameters: low_freq_factor and high_freq_factor must differ")

    def divisor(i: int) -> float:
        turns: float = (
            original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        )  # over the context of pretraining
        if turns > high:
            return 1.0
        if turns < low:
            return factor
        smooth = (turns - low) / (high - low)
        return 1 / ((1 - smooth) / factor + smooth)

    return Rope(theta=theta, factors=tuple(divisor(i) for i in range(head_dim // 2)))


def _yarn(rope: Fields, head_dim: int, context: int) -> Rope:
    theta, original = rope.number("rope_theta"), rope.integer("original_max_position_embeddings")
    factor = rope.number("factor") if rope.has("factor") else context / original
    beta = tuple(
        rope.number(key) if rope.has(key) else default
        for key, default in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW))
    )
    truncate = rope.flag("truncate") if rope.has("truncate") else True
    attention = _yarn_attention(rope, factor)
    if truncate and beta == (BETA_FAST, BETA_SLOW):
        return Rope(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_context=original,
            attention=attention / _magnitude(factor, 1.0),
        )
    low, high = (_turning_dimension(turns, head_dim, theta, original) for turns in beta)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(head_dim // 2)]
    return Rope(theta=theta, attention=attention, factors=tuple(1 / (r / factor + 1 - r) for r in ramp))


def _yarn_attention(rope: Fields, factor: float) -> float:
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return _magnitude(factor, rope.number("mscale")) / _magnitude(factor, rope.number("mscale_all_dim"))
    return _magnitude(factor, 1.0)


def _longrope(rope: Fields, head_dim: int, context: int) -> Rope:
    """Two vectors of factors, of which llama.cpp takes one for a whole context."""
    original = rope.integer("original_max_position_embeddings")
    short, long = rope.numbers("short_factor"), rope.numbers("long_factor")
    if len(short) != head_dim // 2 or len(long) != head_dim // 2:
        raise BadSource(f"config.json: rope parameters: longrope needs {head_dim // 2} factors of each kind")
    growth = rope.number("factor") if rope.has("factor") else context / original
    if rope.has("attention_factor"):
        attention = rope.number("attention_factor")
    else:
        attention = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(original))
    return Rope(
        theta=rope.number("rope_theta"),
        scaling="longrope",
        original_context=original,
        attention=attention,
        short_factors=short,
        long_factors=long,
    )


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _turning_dimension(turns: float, head_dim: int, theta: float, original: int) -> float:
    """The dimension that makes `turns` full turns over the context of pretraining."""
    return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


READERS: Mapping[str, Callable[[Fields, int, int], Rope]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # Phi-3's first name for it
}
