"""Tensors of files that others wrote: taken by name, shape and dtype, or straight from the file."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.files import open_regular
from quant.safetensors_header import TensorInfo

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST_BYTES = 4096


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """Raises BadSource for a tensor that is missing or is not what was promised."""
    tensor = tensors.get(name)
    if tensor is None:
        raise BadSource(f"{name} is missing")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise BadSource(f"{name} is {_form(tensor.dtype, tensor.shape)}, not {_form(dtypes[0], shape)}")
    return tensor


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def stored_bytes(tensor: TensorInfo) -> bytes:
    """The content of a tensor that only holds a few numbers or a little JSON. Raises BadSource."""
    length = tensor.end - tensor.start
    if length > MOST_BYTES:
        raise BadSource(f"{tensor.name} has {length:,} bytes, not a few")
    with open_regular(tensor.file) as stream:
        stream.seek(tensor.start)
        found = stream.read(length)
    if len(found) < length:
        raise BadSource(f"{tensor.file.name} is truncated")
    return found
