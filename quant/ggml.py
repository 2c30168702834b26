"""llama.cpp's numbers as data: file types, tensor types and their block sizes.

Sources in llama.cpp: include/llama.h (llama_ftype), ggml/include/ggml.h (ggml_type), ggml/src/ggml-common.h
(block structs), src/llama-quant.cpp (which types cannot be made without an importance matrix).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class TensorType(NamedTuple):
    """How one tensor's numbers lie in a file: rows are cut into blocks of `elements`, each of `bytes`."""

    number: int
    elements: int
    bytes: int


FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q8_0": 7,
        "q5_0": 8,
        "q5_1": 9,
        "q2_k": 10,
        "q3_k_s": 11,
        "q3_k_m": 12,
        "q3_k_l": 13,
        "q4_k_s": 14,
        "q4_k_m": 15,
        "q5_k_s": 16,
        "q5_k_m": 17,
        "q6_k": 18,
        "iq2_xxs": 19,
        "iq2_xs": 20,
        "q2_k_s": 21,
        "iq3_xs": 22,
        "iq3_xxs": 23,
        "iq1_s": 24,
        "iq4_nl": 25,
        "iq3_s": 26,
        "iq3_m": 27,
        "iq2_s": 28,
        "iq2_m": 29,
        "iq4_xs": 30,
        "iq1_m": 31,
        "bf16": 32,
        "tq1_0": 36,
        "tq2_0": 37,
        "mxfp4_moe": 38,
        "q1_0": 40,
        "q2_0": 41,
    }
)
FILE_TYPE_NAMES: Mapping[int, str] = MappingProxyType({number: name for name, number in FILE_TYPES.items()})

FLOAT_TYPES = frozenset({"f32", "f16", "bf16"})

# q2_k_s because of its q2_k tensors, iq3_xs because its attention keys and queries become iq3_xxs
NEED_IMATRIX = frozenset(
    {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"}
)

TENSOR_TYPES: Mapping[str, TensorType] = MappingProxyType(
    {
        "f32": TensorType(0, 1, 4),
        "f16": TensorType(1, 1, 2),
        "q4_0": TensorType(2, 32, 18),
        "q4_1": TensorType(3, 32, 20),
        "q5_0": TensorType(6, 32, 22),
        "q5_1": TensorType(7, 32, 24),
        "q8_0": TensorType(8, 32, 34),
        "q8_1": TensorType(9, 32, 36),
        "q2_k": TensorType(10, 256, 84),
        "q3_k": TensorType(11, 256, 110),
        "q4_k": TensorType(12, 256, 144),
        "q5_k": TensorType(13, 256, 176),
        "q6_k": TensorType(14, 256, 210),
        "q8_k": TensorType(15, 256, 292),
        "iq2_xxs": TensorType(16, 256, 66),
        "iq2_xs": TensorType(17, 256, 74),
        "iq3_xxs": TensorType(18, 256, 98),
        "iq1_s": TensorType(19, 256, 50),
        "iq4_nl": TensorType(20, 32, 18),
        "iq3_s": TensorType(21, 256, 110),
        "iq2_s": TensorType(22, 256, 82),
        "iq4_xs": TensorType(23, 256, 136),
        "i8": TensorType(24, 1, 1),
        "i16": TensorType(25, 1, 2),
        "i32": TensorType(26, 1, 4),
        "i64": TensorType(27, 1, 8),
        "f64": TensorType(28, 1, 8),
        "iq1_m": TensorType(29, 256, 56),
        "bf16": TensorType(30, 1, 2),
        "tq1_0": TensorType(34, 256, 54),
        "tq2_0": TensorType(35, 256, 66),
        "mxfp4": TensorType(39, 32, 17),
        "nvfp4": TensorType(40, 64, 36),
        "q1_0": TensorType(41, 128, 18),
        "q2_0": TensorType(42, 64, 18),
    }
)
TENSOR_TYPE_NAMES: Mapping[int, str] = MappingProxyType({t.number: name for name, t in TENSOR_TYPES.items()})

# types that llama_model_quantize can write into a tensor
OVERRIDE_TYPES = frozenset(TENSOR_TYPES) - {"q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "nvfp4"}
OVERRIDES_NEED_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
