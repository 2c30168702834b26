"""The table of rounding errors, against llama.cpp's own rounding of numbers from a normal distribution."""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from quant.ggml import TENSOR_TYPES
from quant.search.gguf_space import LADDER, NARROW_LADDER
from quant.search.space import ERRORS


def test_ladders_go_from_near_to_coarse() -> None:
    for ladder in (LADDER, NARROW_LADDER):
        assert [ERRORS[kind] for kind in ladder] == sorted(ERRORS[kind] for kind in ladder)


@pytest.mark.parametrize("kind", sorted({*LADDER, *NARROW_LADDER}))
def test_llama_cpp_rounds_as_the_table_says(kind: str) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    rounded = weights.astype(np.float16).astype(np.float32) if kind == "f16" else _rounded(weights, kind)
    assert float(np.mean((rounded - weights) ** 2)) == pytest.approx(ERRORS[kind], rel=0.2)


def _rounded(weights: "np.ndarray[tuple[int, int], np.dtype[np.float32]]", kind: str) -> np.ndarray:
    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    block, (rows, columns) = TENSOR_TYPES[kind], weights.shape
    out = np.zeros((rows, columns // block.elements * block.bytes), np.uint8)
    base.ggml_quantize_chunk(block.number, weights.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    found: np.ndarray = gguf.quants.dequantize(out, gguf.GGMLQuantizationType(block.number))
    return found
