"""compressed-tensors' int-quantized: int8 weights with a scale a row, activations rounded as they come.

Layout: compressed_tensors/compressors/naive_quantized/base.py; the scheme is its preset INT8_W8A8. What
SmoothQuant moved from activations to weights is folded before.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.formats import compressed, fields
from quant.formats.base import Tensors
from quant.formats.limits import Limits
from quant.formats.tensors import FLOATS, take
from quant.layer import AffineLinear, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

W8A8 = Scheme(bits=8, group=None)
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


class IntQuantized:
    name = "compressed-tensors-int8"
    marker = "weight_scale"
    suffixes = ("weight", "weight_scale", "weight_zero_point")
    limits = Limits(schemes=frozenset({(8, True)}), groups=(None,))

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        return self.limits.refuse(self.name, shape, scheme)

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return source

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, AffineLinear)
        assert layer.scheme == W8A8
        return {
            "weight": (layer.codes ^ 0x80).view(torch.int8),  # two's complement of code - 128
            "weight_scale": layer.scales.contiguous(),
        }

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> AffineLinear:
        if scheme != W8A8:
            raise BadSource("only 8 bits with a scale a row are read")
        weight = take(tensors, "weight", shape, torch.int8)
        scales = take(tensors, "weight_scale", (shape[0], 1), *FLOATS)
        zeros = tensors.get("weight_zero_point")
        if zeros is not None and bool((zeros != 0).any()):
            raise BadSource("the zero points of a symmetric layer are not all 0")
        middles = torch.full_like(scales, W8A8.middle, dtype=torch.uint8)
        return AffineLinear(W8A8, weight.view(torch.uint8) ^ 0x80, scales.contiguous(), middles)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return compressed.reads("int-quantized", config)

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        out, columns = tensors["weight"].shape
        return out, columns

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        return compressed.write_config("int-quantized", layers, kept, inputs=INPUTS)

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        return compressed.read_schemes("int-quantized", config, modules, _read_group)


def _read_group(group: fields.Config) -> Scheme:
    inputs = fields.table(group, "input_activations")
    for field, value in INPUTS.items():
        if inputs.get(field) != value:
            fields.unread(f"input_activations.{field}", inputs.get(field), str(value))
    scheme = compressed.read_weights(group, strategies=("channel",), bits=(8,))
    if scheme != W8A8:
        fields.unread("symmetric", scheme.symmetric, "True")
    return scheme


INT_QUANTIZED = IntQuantized()
