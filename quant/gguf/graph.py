"""The nodes of llama.cpp's compute graph, as its eval callback shows them: ggml.h's struct ggml_tensor."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.errors import BuildFailed
from quant.gguf.native import library

F32 = 0  # ggml_type
DIMENSIONS, OP_PARAMS, SOURCES, NAME = 4, 16, 10, 64  # GGML_MAX_DIMS, _OP_PARAMS / 4, _SRC, _NAME


class Node(ctypes.Structure):
    """One tensor of the graph. `ne[0]` is the length of a row."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * DIMENSIONS),
        ("nb", ctypes.c_size_t * DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * OP_PARAMS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first: ggml's dimensions the other way round."""
        return tuple(reversed(self.ne))

    @property
    def operation(self) -> str:
        """ "MUL_MAT", ..."""
        name: bytes = _functions().ggml_op_desc(ctypes.byref(self))
        return name.decode()

    def source(self, index: int) -> "Node":
        return Node.from_address(self.src[index])

    def array(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A copy of its numbers, wherever they are."""
        copy = np.empty(_functions().ggml_nbytes(ctypes.byref(self)), np.uint8)
        _functions().ggml_backend_tensor_get(ctypes.byref(self), copy.ctypes.data, 0, copy.nbytes)
        return np.ndarray(self.shape, dtype, copy.data, strides=tuple(reversed(self.nb)))


@cache
def _functions() -> ctypes.CDLL:
    """ggml's own functions on tensors, found through libllama's handle."""
    native: ctypes.CDLL = library()._lib
    tensor = ctypes.c_void_p
    native.ggml_op_desc.argtypes, native.ggml_op_desc.restype = [tensor], ctypes.c_char_p
    native.ggml_get_name.argtypes, native.ggml_get_name.restype = [tensor], ctypes.c_char_p
    native.ggml_nbytes.argtypes, native.ggml_nbytes.restype = [tensor], ctypes.c_size_t
    native.ggml_backend_tensor_get.argtypes = [tensor, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    native.ggml_backend_tensor_get.restype = None
    native.ggml_element_size.argtypes = [tensor]
    native.ggml_element_size.restype = ctypes.c_size_t
    return native


def require_known_layout(address: int) -> None:
    """Raises BuildFailed where llama.cpp's struct is not ours, so that no wrong memory is read."""
    node, functions = Node.from_address(address), _functions()
    width = functions.ggml_element_size(ctypes.byref(node))
    name = functions.ggml_get_name(ctypes.byref(node))
    if name != node.name or node.nb[0] != width or functions.ggml_nbytes(ctypes.byref(node)) < width:
        raise BuildFailed("this version of llama.cpp lays out its tensors in a way that is not known here")
