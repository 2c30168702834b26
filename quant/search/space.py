"""The recipes among which a search chooses: presets of one format, and a type for each group of weights.

A group is what one kernel call of a fused engine reads together (queries, keys and values; gate and up),
in one block or, where a model has more blocks than sensitivities are to be measured, in several neighbours.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from types import MappingProxyType
from typing import TypeVar

from quant.recipe import Recipe

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
        "int8": 6e-5,  # a scale a row
        "int4": 1.1e-2,  # a scale for 128 columns
        "keep": 1e-8,  # as the source has it
    }
)
FUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv"), "attn_qkv"),
        **dict.fromkeys(("ffn_gate", "ffn_up"), "ffn_gate_up"),
        **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps"),
        **{f"self_attn.{role}_proj": "self_attn.qkv_proj" for role in ("q", "k", "v", "qkv")},
        **{f"mlp.{role}_proj": "mlp.gate_up_proj" for role in ("gate", "up", "gate_up")},
    }
)
BLOCKS_A_PATTERN, ROLES_A_PATTERN = 30, 3  # a pattern has 200 characters at most
Item = TypeVar("Item")
_PLACE = re.compile(r"(.*?)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Matrices that get one type. `sizes`: their bytes by type, from the nearest to the coarsest."""

    name: str  # "attn_qkv of blocks 0 to 2", "token_embd"
    tensors: tuple[str, ...]
    weights: int
    sizes: Mapping[str, int]

    @property
    def ladder(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def like(self, kind: str) -> str:
        """The type of the ladder whose errors are nearest to those of `kind`."""
        return min(self.sizes, key=lambda one: (abs(log(ERRORS[one] / ERRORS[kind])), one))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    name: str
    bytes: int  # of the whole variant, predicted
    kind: str | None = None  # the type of a ladder that it is made of, for the most part


Make = Callable[[Mapping[str, str], Sequence[Group]], Recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    groups: tuple[Group, ...]
    presets: tuple[Preset, ...]  # from large to small
    fixed: int  # bytes of a variant beside the groups: vocabulary, norms, tokenizer
    elements: int  # weights of the source
    make: Make  # the recipe of a mixture: a type by group
    words: str  # what is searched

    def bytes(self, types: Mapping[str, str]) -> int:
        return self.fixed + sum(group.sizes[types[group.name]] for group in self.groups)

    def recipe(self, types: Mapping[str, str]) -> Recipe:
        return self.make(types, self.groups)


def from_large(presets: Iterable[Preset]) -> tuple[Preset, ...]:
    return tuple(sorted(presets, key=lambda one: (-one.bytes, one.name)))


def main_kind(types: Mapping[str, str], groups: Sequence[Group], without: str) -> str | None:
    """The type that most weights have, `without` one that no recipe can be named for."""
    weights = dict.fromkeys(types.values(), 0)
    for group in groups:
        weights[types[group.name]] += group.weights
    weights.pop(without, None)
    return max(weights, key=lambda kind: (weights[kind], kind)) if weights else None


def overrides_of(types: Mapping[str, str], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(pattern, type): each tensor is matched by one pattern."""
    kinds = {name: types[group.name] for group in groups for name in group.tensors}
    return [
        (pattern, kind)
        for kind in dict.fromkeys(kinds.values())
        for pattern in patterns_of([name for name in kinds if kinds[name] == kind])
    ]


def patterns_of(tensors: Iterable[str]) -> list[str]:
    """Regular expressions that match these names and no others: blocks that have the same roles are one."""
    roles: dict[tuple[str, str], list[str]] = {}
    plain = []
    for name in tensors:
        if match := _PLACE.fullmatch(name):
            roles.setdefault((match[1], match[3]), []).append(match[2])
        else:
            plain.append(f"^{re.escape(name)}$")
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (stem, role), blocks in roles.items():
        for some in in_parts(blocks, BLOCKS_A_PATTERN):
            alike.setdefault((stem, some), []).append(role)
    return plain + [
        rf"^{re.escape(stem)}\.({'|'.join(blocks)})\.({'|'.join(map(re.escape, some))})$"
        for (stem, blocks), those in alike.items()
        for some in in_parts(those, ROLES_A_PATTERN)
    ]


def grouped(
    names: Iterable[str], role_of: Callable[[str], str], most: int
) -> Iterator[tuple[str, list[str]]]:
    """(label, names), by fused role and block; neighbouring blocks together if that were more than `most`."""
    fused: dict[str, dict[int, list[str]]] = {}
    for name in names:
        match = _PLACE.fullmatch(name)
        if match is None:
            yield role_of(name), [name]
            continue
        role = role_of(match[3])
        fused.setdefault(FUSED.get(role, role), {}).setdefault(int(match[2]), []).append(name)
    for role, blocks in fused.items():
        wide = -(-len(blocks) * len(fused) // max(most, 1))
        for some in in_parts(sorted(blocks), wide):
            label = f"block {some[0]}" if len(some) == 1 else f"blocks {some[0]} to {some[-1]}"
            yield f"{role} of {label}", [name for block in some for name in blocks[block]]


def in_parts(items: Sequence[Item], most: int) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(items), most):
        yield tuple(items[start : start + most])
