"""The recipes among which a search chooses: llama.cpp's presets, and a tensor type for each group of weights.

A group is what one kernel call of a fused engine reads together (queries, keys and values; gate and up),
in one block or, where a model has more blocks than sensitivities are to be measured, in several neighbours.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from quant.errors import BadSource
from quant.gguf.header import GgufHeader
from quant.gguf.mixture import Stack, row_bytes, tensor_type
from quant.recipe import GgufRecipe

PRESETS = (
    *("q8_0", "q6_k", "q5_1", "q5_k_m", "q5_k_s", "q5_0", "q4_1", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs"),
    *("q4_0", "q3_k_l", "q3_k_m", "iq3_s", "q3_k_s", "q2_k"),
)
"""Those that need no importance matrix."""

# Mean squared error of each type on numbers from a normal distribution, as llama.cpp rounds them, relative to
# the numbers' own mean square (tests/quant/search/test_errors.py rounds them again).
ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "f16": 4.3e-8,
        "q8_0": 2.9e-5,
        "q6_k": 3.1e-4,
        "q5_k": 1.32e-3,
        "q5_1": 1.45e-3,
        "q5_0": 1.83e-3,
        "q4_k": 5.1e-3,
        "iq4_nl": 5.8e-3,
        "iq4_xs": 5.9e-3,
        "q4_1": 6.1e-3,
        "q3_k": 2.3e-2,
        "q2_k": 8.8e-2,
    }
)
LADDER = ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
NARROW_LADDER = ("f16", "q8_0", "q5_1", "q5_0", "iq4_nl")  # rows that are no multiple of 256
WIDE_BLOCK = 256
FUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv"), "attn_qkv"),
        **dict.fromkeys(("ffn_gate", "ffn_up"), "ffn_gate_up"),
        **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps"),
    }
)
Item = TypeVar("Item")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp|position_embd|token_types|ssm_conv1d|shortconv")
BLOCKS_A_PATTERN, ROLES_A_PATTERN = 30, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Matrices that get one type. `shapes`: (rows, columns) of each."""

    name: str  # "attn_qkv of blocks 0 to 2", "token_embd"
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def ladder(self) -> tuple[str, ...]:
        """Types that fit, from the nearest to the coarsest."""
        wide = all(columns % WIDE_BLOCK == 0 for _, columns in self.shapes)
        return LADDER if wide else NARROW_LADDER

    def bytes(self, kind: str) -> int:
        return sum(rows * row_bytes(kind, columns) for rows, columns in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    name: str
    bytes: int  # of the whole variant, predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    groups: tuple[Group, ...]
    presets: tuple[Preset, ...]  # from large to small
    fixed: int  # bytes of a variant beside the groups: vocabulary, norms, tokenizer
    elements: int  # weights of the source

    def bytes(self, types: Mapping[str, str]) -> int:
        return self.fixed + sum(group.bytes(types[group.name]) for group in self.groups)

    @property
    def words(self) -> str:
        return (
            f"presets {', '.join(one.name for one in self.presets)}; mixtures of {', '.join(LADDER)} "
            f"(of {', '.join(NARROW_LADDER)} where rows are no multiple of {WIDE_BLOCK}) "
            f"over {len(self.groups)} groups of weights"
        )


def space_of(header: GgufHeader, *, fixed: int, most_groups: int) -> Space:
    """Of a float GGUF file; `fixed`: bytes beside its tensors' own. Raises BadSource."""
    weights = {
        tensor.name: (tensor.elements // tensor.shape[0], tensor.shape[0])
        for tensor in header.tensors
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight") and not _KEPT.search(tensor.name)
    }
    if not weights:
        raise BadSource("the source has no matrices that could be quantized")
    kept = sum(4 * one.elements for one in header.tensors if one.name not in weights)
    stack = _stack(header, weights)
    presets = [
        Preset(name=name, bytes=fixed + kept + _preset_bytes(name, weights, stack)) for name in PRESETS
    ]
    return Space(
        groups=tuple(_groups(weights, most_groups)),
        presets=tuple(sorted(presets, key=lambda one: (-one.bytes, one.name))),
        fixed=fixed + kept,
        elements=sum(one.elements for one in header.tensors),
    )


def recipe_of(types: Mapping[str, str], groups: Sequence[Group]) -> GgufRecipe:
    """As few overrides as may be: the type that most weights have is the file's own."""
    tensors = {name: types[group.name] for group in groups for name in group.tensors}
    weights = dict.fromkeys(types.values(), 0)
    for group in groups:
        weights[types[group.name]] += sum(rows * columns for rows, columns in group.shapes)
    weights.pop("f16", None)  # no file of a float type takes overrides
    base = max(weights, key=lambda kind: (weights[kind], kind)) if weights else "q8_0"
    patterns = [
        (pattern, kind)
        for kind in dict.fromkeys(tensors.values())
        for pattern in patterns_of([name for name in tensors if tensors[name] == kind])
    ]
    return GgufRecipe(type=FILE_TYPE.get(base, base), overrides=tuple(patterns))


FILE_TYPE: Mapping[str, str] = MappingProxyType({"q5_k": "q5_k_s", "q4_k": "q4_k_s", "q3_k": "q3_k_s"})


def patterns_of(tensors: Iterable[str]) -> list[str]:
    """Regular expressions that match these tensors and no others, by role."""
    roles: dict[str, list[str]] = {}
    plain = []
    for name in tensors:
        if match := _BLOCK.fullmatch(name):
            roles.setdefault(match[2], []).append(match[1])
        else:
            plain.append(f"^{re.escape(name)}$")
    by_blocks: dict[tuple[str, ...], list[str]] = {}
    for role, blocks in roles.items():
        for some in _some(blocks, BLOCKS_A_PATTERN):
            by_blocks.setdefault(some, []).append(role)
    return plain + [
        rf"^blk\.({'|'.join(blocks)})\.({'|'.join(some)})\.weight$"
        for blocks, roles_of in by_blocks.items()
        for some in _some(roles_of, ROLES_A_PATTERN)
    ]


def _groups(weights: Mapping[str, tuple[int, int]], most: int) -> Iterable[Group]:
    fused: dict[str, dict[int, list[str]]] = {}
    for name in weights:
        match = _BLOCK.fullmatch(name)
        if match is None:
            yield Group(name=name.removesuffix(".weight"), tensors=(name,), shapes=(weights[name],))
            continue
        role = FUSED.get(match[2], match[2])
        fused.setdefault(role, {}).setdefault(int(match[1]), []).append(name)
    for role, blocks in fused.items():
        wide = -(-len(blocks) * len(fused) // max(most, 1))
        for some in _some(sorted(blocks), wide):
            names = tuple(name for block in some for name in blocks[block])
            label = f"block {some[0]}" if len(some) == 1 else f"blocks {some[0]} to {some[-1]}"
            yield Group(
                name=f"{role} of {label}", tensors=names, shapes=tuple(weights[name] for name in names)
            )


def _preset_bytes(name: str, weights: Mapping[str, tuple[int, int]], stack: Stack) -> int:
    return sum(
        rows * row_bytes(tensor_type(name, tensor, columns, stack), columns)
        for tensor, (rows, columns) in weights.items()
    )


def _stack(header: GgufHeader, weights: Mapping[str, tuple[int, int]]) -> Stack:
    def number(key: str, otherwise: int) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}")
        return value if isinstance(value, int) and value > 0 else otherwise

    heads = number("attention.head_count", 1)
    return Stack(
        layers=number("block_count", 1),
        shared_heads=max(1, heads // number("attention.head_count_kv", heads)),
        tied="output.weight" not in weights,
    )


def _some(items: Sequence[Item], most: int) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(items), most):
        yield tuple(items[start : start + most])
