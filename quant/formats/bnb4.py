"""bitsandbytes' 4-bit files: NF4 or FP4 in blocks, with or without double quantization.

Layout: bitsandbytes/functional.py (QuantState.as_dict) and bitsandbytes/backends/default/ops.py
(quantize_4bit). The codes of the whole matrix follow each other, two a byte, the first in the high half.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.codebooks import KINDS
from quant.errors import BadSource
from quant.files import shown
from quant.formats import fields
from quant.formats.base import Tensors
from quant.formats.bnb_config import quantized, write_config
from quant.formats.tensors import MOST_BYTES, stored_bytes, take
from quant.layer import CodebookLinear, NestedScales, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

BLOCK = 64  # what is written
_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Bnb4:
    name = "bnb4"
    marker = "weight.absmax"
    suffixes = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(_STATE + kind for kind in KINDS),
    )

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        columns = shape[1]
        if scheme is not None:
            return f"{self.name} has a scheme of its own"
        if columns % BLOCK and columns % 16 == 0:
            return (
                f"bitsandbytes' kernels for CPUs misread rows of {columns:,} columns, "
                f"a multiple of 16 that is none of {BLOCK}"
            )
        return None

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return torch.float32

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, CodebookLinear)
        state: dict[str, Any] = {
            "quant_type": layer.kind,
            "blocksize": layer.blocksize,
            "dtype": _dtype_name(layer.dtype),
            "shape": list(layer.shape),
        }
        tensors = {"weight": _pack(layer.codes), "weight.quant_map": layer.codebook.contiguous()}
        match layer.absmax:
            case NestedScales() as nested:
                state |= {
                    "nested_blocksize": nested.blocksize,
                    "nested_dtype": "float32",
                    "nested_offset": nested.offset,
                }
                tensors["weight.absmax"] = nested.codes.contiguous()
                tensors["weight.nested_absmax"] = nested.absmax.contiguous()
                tensors["weight.nested_quant_map"] = nested.codebook.contiguous()
            case absmax:
                tensors["weight.absmax"] = absmax.contiguous()
        tensors[_STATE + layer.kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> CodebookLinear:
        state = _state(tensors)
        if state.shape != shape:
            raise BadSource(f"quant_state says {list(state.shape)}, not {list(shape)}")
        count = math.prod(shape)
        blocks = -(-count // state.blocksize)
        weight = take(tensors, "weight", (-(-count // 2), 1), torch.uint8)
        book = take(tensors, "weight.quant_map", (16,), torch.float32)
        absmax = state.nested(tensors, blocks) or take(tensors, "weight.absmax", (blocks,), torch.float32)
        codes = _unpack(weight, shape)
        return CodebookLinear(state.kind, codes, book.contiguous(), state.blocksize, absmax, state.dtype)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "bitsandbytes" and config.get("load_in_4bit") is True

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """From the JSON in the file: the packed weight is flat."""
        for kind in KINDS:
            if info := tensors.get(_STATE + kind):
                return _State(stored_bytes(info), kind).shape
        raise BadSource("quant_state of nf4 or fp4 is missing")

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        assert isinstance(sample, CodebookLinear)
        return write_config(
            kept,
            load_in_4bit=True,
            load_in_8bit=False,
            bnb_4bit_quant_type=sample.kind,
            bnb_4bit_use_double_quant=isinstance(sample.absmax, NestedScales),
            bnb_4bit_compute_dtype=_dtype_name(sample.dtype),
            bnb_4bit_quant_storage="uint8",
        )

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        fields.only(config, "bnb_4bit_quant_storage", "uint8")
        fields.only(config, "bnb_4bit_quant_type", "fp4", "nf4")
        return quantized(config, modules)


def _state(tensors: Tensors) -> "_State":
    for kind in KINDS:
        found = tensors.get(_STATE + kind)
        if found is not None and found.dtype is torch.uint8 and found.numel() <= MOST_BYTES:
            return _State(bytes(found.flatten().tolist()), kind)
    raise BadSource("quant_state of nf4 or fp4 is missing")


class _State:
    """The JSON that bitsandbytes stores as a tensor of bytes. Raises BadSource for what it never writes."""

    def __init__(self, raw: bytes, kind: str) -> None:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("quant_type") != kind:
            raise BadSource(f"quant_state of {kind} is not its JSON")
        self.kind = kind
        self.blocksize: int = self._choice(found, "blocksize", _BLOCKS)
        self.dtype = _DTYPES[self._choice(found, "dtype", tuple(_DTYPES))]
        self.shape = self._shape(found.get("shape"))
        self.fields = found

    def nested(self, tensors: Tensors, blocks: int) -> NestedScales | None:
        if "nested_offset" not in self.fields:
            return None
        offset = self.fields["nested_offset"]
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            raise BadSource(f"quant_state has nested_offset {shown(offset)}")
        blocksize = self._choice(self.fields, "nested_blocksize", _BLOCKS)
        codes = take(tensors, "weight.absmax", (blocks,), torch.uint8)
        absmax = take(tensors, "weight.nested_absmax", (-(-blocks // blocksize),), torch.float32)
        book = take(tensors, "weight.nested_quant_map", (256,), torch.float32)
        return NestedScales(
            codes.contiguous(), absmax.contiguous(), book.contiguous(), float(offset), blocksize
        )

    @staticmethod
    def _choice(found: dict[str, Any], field: str, values: tuple[Any, ...]) -> Any:
        value = found.get(field)
        if type(value) is not type(values[0]) or value not in values:
            raise BadSource(f"quant_state has {field} {shown(value)}, which is not supported")
        return value

    @staticmethod
    def _shape(value: object) -> tuple[int, int]:
        match value:
            case [int(out), int(columns)] if out > 0 and columns > 0:
                return out, columns
            case _:
                raise BadSource(f"quant_state has shape {shown(value)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pack(codes: Tensor) -> Tensor:
    flat = pad(codes.flatten(), (0, codes.numel() % 2))
    return (flat[::2] << 4 | flat[1::2])[:, None]


def _unpack(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    codes = torch.stack([weight.flatten() >> 4, weight.flatten() & 15], dim=1)
    return codes.flatten()[: math.prod(shape)].view(shape).contiguous()


BNB4 = Bnb4()
