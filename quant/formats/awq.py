"""AutoAWQ's GEMM files: 4 bits with zero points, packed along the output in an order of their own.

Layout: AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py. What AWQ scaled is folded into
the layers before, so that a reader sees ordinary groups.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadRecipe
from quant.formats import fields
from quant.formats.base import Tensors
from quant.formats.limits import GROUPS, Limits, whole_groups
from quant.formats.packing import pack_words, unpack_words
from quant.formats.tensors import FLOATS, take
from quant.layer import AffineLinear, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

# Which of a word's 8 columns lies in each nibble, lowest first, and the way back.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqGemm:
    name = "awq"
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales")
    limits = Limits(schemes=frozenset({(4, False)}), groups=GROUPS, out_words=True)

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        return self.limits.refuse(self.name, shape, scheme)

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return torch.float16

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, AffineLinear)
        assert layer.scales.dtype is torch.float16
        return {
            "qweight": _pack(layer.codes.T),
            "qzeros": _pack(layer.zeros.T),
            "scales": layer.scales.T.contiguous(),
        }

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> AffineLinear:
        scheme = whole_groups(shape, scheme)
        out, columns = shape
        groups = scheme.groups(columns)
        qweight = take(tensors, "qweight", (columns, out // 8), torch.int32)
        qzeros = take(tensors, "qzeros", (groups, out // 8), torch.int32)
        scales = take(tensors, "scales", (groups, out), *FLOATS)
        return AffineLinear(scheme, _unpack(qweight), scales.T.contiguous(), _unpack(qzeros))

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "awq"

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        columns, words = tensors["qweight"].shape
        return words * 8, columns

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        if len(schemes := set(layers.values())) != 1:
            raise BadRecipe(f"{self.name} has one scheme for all layers, not {len(schemes)}")
        scheme = schemes.pop()
        assert scheme is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group or -1,
            "zero_point": True,
            "modules_to_not_convert": list(kept) or None,
        }

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        fields.only(config, "bits", 4)
        fields.only(config, "version", "gemm", "GEMM")
        fields.only(config, "checkpoint_format", "gemm")  # GPTQModel's name for it
        fields.only(config, "zero_point", True)
        fields.only(config, "backend", "autoawq")
        scheme = Scheme(bits=4, group=fields.group_size(config, 128), symmetric=False)
        skipped = fields.texts(config, "modules_to_not_convert")
        return {name: scheme for name in modules if not any(part in name for part in skipped)}


def _pack(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return pack_words(matrix.reshape(rows, columns // 8, 8)[..., ORDER].flatten(1), 4)


def _unpack(words: Tensor) -> Tensor:
    """uint8, transposed back to [out, ...]."""
    rows, count = words.shape
    codes = unpack_words(words, 4, count * 8).view(rows, count, 8)[..., BACK]
    return codes.reshape(rows, -1).T.contiguous()


AWQ = AwqGemm()
