"""Numbers to a tensor type's bytes and back, by llama.cpp's own code (ggml/include/ggml.h)."""

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from quant.ggml import TENSOR_TYPES
from quant.gguf.native import library

Rows = npt.NDArray[np.float32]
ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ToFloat),
    )


@cache
def _traits(kind: str) -> Traits:
    function = library()._lib.ggml_get_type_traits
    function.restype, function.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    found: Traits = function(TENSOR_TYPES[kind].number).contents
    return found


def is_known(kind: str) -> bool:
    """Whether this llama.cpp has the type, laid out as we think."""
    block = TENSOR_TYPES.get(kind)
    if block is None:
        return False
    traits = _traits(kind)
    same = (traits.blck_size, traits.type_size) == (block.elements, block.bytes)
    return same and bool(traits.to_float) and (traits.type_name or b"").decode().lower() == kind


def unpacked(kind: str, packed: npt.NDArray[np.uint8]) -> Rows:
    """[rows, bytes] to [rows, columns]."""
    block, data = TENSOR_TYPES[kind], np.ascontiguousarray(packed)
    rows = np.empty((len(data), data.shape[1] // block.bytes * block.elements), np.float32)
    _traits(kind).to_float(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows


def rounded(kind: str, rows: Rows) -> Rows:
    """As the type stores them, every column as important as the others."""
    block, source = TENSOR_TYPES[kind], np.ascontiguousarray(rows, np.float32)
    count, columns = source.shape
    packed = np.zeros((count, columns // block.elements * block.bytes), np.uint8)
    ones = np.ones(columns, np.float32)
    function = library()._lib.ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    function(block.number, source.ctypes.data, packed.ctypes.data, 0, count, columns, ones.ctypes.data)
    return unpacked(kind, packed)
