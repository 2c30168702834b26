"""Searching among GGUF files: llama.cpp's presets, and a tensor type for each group."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from quant.errors import BadSource
from quant.gguf.header import GgufHeader
from quant.gguf.mixture import BASES, Stack, row_bytes, tensor_type
from quant.recipe import GgufRecipe
from quant.search.space import Group, Preset, Space, from_large, grouped, main_kind, overrides_of

PRESETS = (
    *("q8_0", "q6_k", "q5_1", "q5_k_m", "q5_k_s", "q5_0", "q4_1", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs"),
    *("q4_0", "q3_k_l", "q3_k_m", "iq3_s", "q3_k_s", "q2_k"),
)
"""Those that need no importance matrix."""

LADDER = ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
NARROW_LADDER = ("f16", "q8_0", "q5_1", "q5_0", "iq4_nl")  # rows that are no multiple of 256
WIDE_BLOCK = 256
WHOLE = "f16"
FILE_TYPE: Mapping[str, str] = MappingProxyType({"q5_k": "q5_k_s", "q4_k": "q4_k_s", "q3_k": "q3_k_s"})
_KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp|position_embd|token_types|ssm_conv1d|shortconv")
Weights = Mapping[str, tuple[int, int]]  # rows, columns


def gguf_space(header: GgufHeader, *, fixed: int, most_groups: int) -> Space:
    """Of a float GGUF file; `fixed`: bytes beside its tensors' own. Raises BadSource."""
    weights = {
        tensor.name: (tensor.elements // tensor.shape[0], tensor.shape[0])
        for tensor in header.tensors
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight") and not _KEPT.search(tensor.name)
    }
    if not weights:
        raise BadSource("the source has no matrices that could be quantized")
    fixed += sum(4 * one.elements for one in header.tensors if one.name not in weights)
    presets = from_large(_preset(name, fixed, weights, stack_of(header, weights)) for name in PRESETS)
    names = grouped(weights, lambda name: name.removesuffix(".weight"), most_groups)
    groups = tuple(group_of(label, some, weights) for label, some in names)
    return Space(
        groups=groups,
        presets=presets,
        fixed=fixed,
        elements=sum(one.elements for one in header.tensors),
        make=gguf_mixture,
        words=(
            f"presets {', '.join(one.name for one in presets)}; mixtures of {', '.join(LADDER)} "
            f"(of {', '.join(NARROW_LADDER)} where rows are no multiple of {WIDE_BLOCK}) "
            f"over {len(groups)} groups of weights"
        ),
    )


def group_of(label: str, names: Sequence[str], weights: Weights) -> Group:
    shapes = [weights[name] for name in names]
    wide = all(columns % WIDE_BLOCK == 0 for _, columns in shapes)
    return Group(
        name=label,
        tensors=tuple(names),
        weights=sum(rows * columns for rows, columns in shapes),
        sizes={
            kind: sum(rows * row_bytes(kind, columns) for rows, columns in shapes)
            for kind in (LADDER if wide else NARROW_LADDER)
        },
    )


def gguf_mixture(types: Mapping[str, str], groups: Sequence[Group]) -> GgufRecipe:
    """The type that most weights have is the file's own; no file of a float type takes overrides."""
    base = main_kind(types, groups, without=WHOLE) or "q8_0"
    return GgufRecipe(type=FILE_TYPE.get(base, base), overrides=tuple(overrides_of(types, groups)))


def gguf_alone(name: str, kind: str, groups: Sequence[Group]) -> GgufRecipe:
    """One group at `kind`, everything else in 16 bits."""
    types = {group.name: kind if group.name == name else WHOLE for group in groups}
    base = "q4_k_s" if kind == "q8_0" else "q8_0"  # llama.cpp passes over an override that changes nothing
    return GgufRecipe(type=base, overrides=tuple(overrides_of(types, groups)))


def _preset(name: str, fixed: int, weights: Weights, stack: Stack) -> Preset:
    size = sum(
        rows * row_bytes(tensor_type(name, tensor, columns, stack), columns)
        for tensor, (rows, columns) in weights.items()
    )
    base = BASES.get(name, name)
    return Preset(name=name, bytes=fixed + size, kind=base if base in LADDER else None)


def stack_of(header: GgufHeader, weights: Weights) -> Stack:
    def number(key: str, otherwise: int) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}")
        return value if isinstance(value, int) and value > 0 else otherwise

    heads = number("attention.head_count", 1)
    return Stack(
        layers=number("block_count", 1),
        shared_heads=max(1, heads // number("attention.head_count_kv", heads)),
        tied="output.weight" not in weights,
    )
