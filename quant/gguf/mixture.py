"""Which type llama.cpp gives to which tensor, for sizes that are known before anything is built.

Source: src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback, for dense models of this
package's families. What is not in the table keeps the file type's base type.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quant.ggml import TENSOR_TYPES

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_FEW = frozenset({"iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq1_s", "iq1_m"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What the choice depends on besides the tensor."""

    layers: int
    shared_heads: int  # query heads that share one key head
    tied: bool  # the embedding is the output too
    imatrix: bool = False


def tensor_type(file_type: str, name: str, columns: int, stack: Stack) -> str:
    """Of a weight with rows of `columns` numbers; `file_type` and the result are keys of quant.ggml."""
    wanted = _wanted(file_type, name, columns, stack)
    return wanted if columns % TENSOR_TYPES[wanted].elements == 0 else _fallback(wanted, columns)


def row_bytes(kind: str, columns: int) -> int:
    block = TENSOR_TYPES[kind]
    return columns // block.elements * block.bytes


def _wanted(file_type: str, name: str, columns: int, stack: Stack) -> str:
    base = BASES.get(file_type, file_type)
    if name == "output.weight" or (stack.tied and name == "token_embd.weight"):
        return _output(file_type, base, columns)
    if name == "token_embd.weight":
        return _EMBEDDINGS.get(file_type, base)
    match = _LAYER.fullmatch(name)
    if match is None:
        return base
    layer, role = int(match[1]), match[2]
    choose = _MORE.get((file_type, role))
    kind = choose(layer, stack) if choose else base
    if role == "attn_v" and stack.layers == 80 and kind in {"q3_k", "q4_k"}:  # the 70B model
        return "q5_k"
    return kind


def _output(file_type: str, base: str, columns: int) -> str:
    if columns % TENSOR_TYPES[base].elements:
        return "q8_0"
    if file_type in _FEW:
        return "q5_k"
    return base if base in {"q8_0", "f16", "bf16", "f32"} else "q6_k"


def _fallback(wanted: str, columns: int) -> str:
    """For rows that are no multiple of the type's block."""
    kind = _FALLBACKS.get(wanted, wanted)
    return kind if columns % TENSOR_TYPES[kind].elements == 0 else "f16"


BASES: Mapping[str, str] = MappingProxyType(
    {
        **{f"q{bits}_k_{size}": f"q{bits}_k" for bits in (3, 4, 5) for size in "sml"},
        "q2_k_s": "q2_k",
        "iq2_m": "iq2_s",
        "iq3_m": "iq3_s",
        "iq3_xs": "iq3_s",
        "iq2_s": "iq2_xs",
    }
)
_EMBEDDINGS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "q2_k"),
        **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
        **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "q4_k"),
    }
)
_FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"], "iq4_nl"
        ),
        **dict.fromkeys(["q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"], "q4_0"),
        "q4_k": "q5_0",
        "q5_k": "q5_1",
        "q6_k": "q8_0",
    }
)
Choice = Callable[[int, Stack], str]


def _outer(layer: int, stack: Stack) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth of the layers, and each third between."""
    eighth = stack.layers // 8
    return layer < eighth or layer >= 7 * stack.layers // 8 or (layer - eighth) % 3 == 2


def _always(kind: str) -> Choice:
    return lambda _layer, _stack: kind


def _if_outer(kind: str, otherwise: str) -> Choice:
    return lambda layer, stack: kind if _outer(layer, stack) else otherwise


def _if_first(share: int, kind: str, otherwise: str) -> Choice:
    return lambda layer, stack: kind if layer < stack.layers // share else otherwise


def _if_shared(kind: str, otherwise: str) -> Choice:
    return lambda _layer, stack: kind if stack.shared_heads >= 4 else otherwise


def _if_bare(choice: Choice, otherwise: str) -> Choice:
    """Without an importance matrix."""
    return lambda layer, stack: otherwise if stack.imatrix else choice(layer, stack)


def _if_informed(choice: Choice, otherwise: str) -> Choice:
    return lambda layer, stack: choice(layer, stack) if stack.imatrix else otherwise


def _if_inner(kind: str, otherwise: str) -> Choice:
    """Between the first and the last eighth of the layers."""
    return lambda layer, stack: kind if stack.layers // 8 <= layer < 7 * stack.layers // 8 else otherwise


_MORE: Mapping[tuple[str, str], Choice] = MappingProxyType(
    {
        ("q2_k", "attn_v"): _if_shared("q4_k", "q3_k"),
        ("q2_k", "ffn_down"): _always("q3_k"),
        ("q2_k", "attn_output"): _always("q3_k"),
        ("q2_k_s", "attn_v"): _if_shared("q4_k", "q2_k"),
        ("q2_k_s", "ffn_down"): _if_first(8, "q4_k", "q2_k"),
        ("q3_k_m", "attn_v"): lambda layer, _stack: "q5_k" if layer < 2 else "q4_k",
        ("q3_k_m", "ffn_down"): _if_first(16, "q5_k", "q4_k"),
        ("q3_k_m", "attn_output"): _always("q4_k"),
        **{("q3_k_l", role): _always("q5_k") for role in ("attn_v", "ffn_down", "attn_output")},
        ("q4_k_s", "attn_v"): lambda layer, _stack: "q5_k" if layer < 4 else "q4_k",
        ("q4_k_s", "ffn_down"): _if_first(8, "q5_k", "q4_k"),
        **{
            (f"q{bits}_k_m", role): _if_outer("q6_k", f"q{bits}_k")
            for bits in (4, 5)
            for role in ("attn_v", "ffn_down")
        },
        **{(kind, "attn_qkv"): _always("q4_k") for kind in ("q3_k_m", "q3_k_l", "iq3_m")},
        ("q4_k_m", "attn_qkv"): _always("q5_k"),
        ("q5_k_m", "attn_qkv"): _always("q6_k"),
        ("q4_0", "ffn_down"): _if_informed(_if_first(8, "q4_1", "q4_0"), "q4_0"),
        ("q5_0", "ffn_down"): _if_informed(_if_first(8, "q5_1", "q5_0"), "q5_0"),
        **{(kind, "attn_v"): _if_shared("q5_k", kind) for kind in ("iq4_nl", "iq4_xs")},
        **{(kind, "ffn_down"): _if_bare(_if_first(8, "q5_k", kind), kind) for kind in ("iq4_nl", "iq4_xs")},
        ("iq3_xxs", "attn_v"): _if_shared("q4_k", "iq3_xxs"),
        ("iq3_xxs", "attn_q"): _always("iq2_s"),
        ("iq3_xxs", "attn_k"): _always("iq2_s"),
        ("iq3_xxs", "attn_output"): _always("iq3_s"),
        ("iq3_xs", "attn_v"): _if_shared("q4_k", "iq3_s"),
        ("iq3_xs", "attn_q"): _always("iq3_xxs"),
        ("iq3_xs", "attn_k"): _always("iq3_xxs"),
        ("iq3_xs", "ffn_gate"): _if_inner("iq3_xxs", "iq3_s"),
        ("iq3_xs", "ffn_up"): _if_inner("iq3_xxs", "iq3_s"),
        ("iq3_s", "attn_v"): _if_shared("q4_k", "iq3_s"),
        ("iq3_m", "attn_v"): _always("q4_k"),
        ("iq3_m", "attn_output"): _always("q4_k"),
        ("iq3_m", "ffn_down"): _if_first(8, "q4_k", "iq3_s"),
        **{(kind, "attn_v"): _if_shared("q4_k", "iq3_s") for kind in ("iq2_s", "iq2_m")},
        **{(kind, "attn_output"): _always("iq3_s") for kind in ("iq2_s", "iq2_m")},
        ("iq2_s", "ffn_down"): _if_first(8, "iq3_s", "iq2_xs"),
        ("iq2_m", "ffn_down"): _if_first(8, "iq3_s", "iq2_s"),
        **{(kind, "attn_v"): _if_shared("q4_k", "q2_k") for kind in ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m")},
        **{
            (kind, "ffn_down"): _if_first(8, "q2_k", kind) for kind in ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m")
        },
        ("iq1_s", "attn_output"): _always("iq2_xxs"),
        ("iq1_m", "attn_output"): _always("iq2_xxs"),
    }
)
