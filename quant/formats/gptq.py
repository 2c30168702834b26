"""GPTQ's files: codes packed along the input, zero points along the output.

Layout: GPTQModel gptqmodel/nn_modules/qlinear (pack_original), gptqmodel/utils/model.py. Version 1, which
every reader takes, stores zero points less one; the one is taken off whole words, so that a zero point of 0
borrows from its neighbour. Some readers put it back word by word, some code by code. Symmetric layers never
borrow, and only they are written; others are read word by word, as GPTQModel writes them.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.formats import fields
from quant.formats.base import Tensors
from quant.formats.limits import GROUPS, Limits, middle_everywhere, whole_groups
from quant.formats.packing import pack_words, unpack_words
from quant.formats.tensors import FLOATS, take
from quant.layer import AffineLinear, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

_ONES = {4: 0x11111111, 8: 0x01010101}  # one in every code of a word


@dataclass(frozen=True, slots=True)
class GptqFormat:
    name: str
    checkpoint_format: str
    less_one: bool  # whether zero points are stored less one

    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    limits = Limits(
        schemes=frozenset({(4, True), (8, True)}), groups=(*GROUPS, None), in_words=True, out_words=True
    )

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        if self.checkpoint_format != "gptq":
            return f"{self.checkpoint_format} is only read; write gptq"
        return self.limits.refuse(self.name, shape, scheme)

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return torch.float16

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, AffineLinear)
        assert layer.scales.dtype is torch.float16
        bits = layer.scheme.bits
        zeros = pack_words(layer.zeros.T, bits)
        return {
            "qweight": pack_words(layer.codes, bits).T.contiguous(),
            "qzeros": zeros - _ONES[bits] if self.less_one else zeros,
            "scales": layer.scales.T.contiguous(),
            "g_idx": _group_of_column(layer.shape[1], layer.scheme, layer.codes.device),
        }

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> AffineLinear:
        scheme = whole_groups(shape, scheme)
        (out, columns), bits = shape, scheme.bits
        groups = scheme.groups(columns)
        qweight = take(tensors, "qweight", (columns * bits // 32, out), torch.int32)
        qzeros = take(tensors, "qzeros", (groups, out * bits // 32), torch.int32)
        scales = take(tensors, "scales", (groups, out), *FLOATS)
        g_idx = take(tensors, "g_idx", (columns,), torch.int32)
        if not torch.equal(g_idx, _group_of_column(columns, scheme, g_idx.device)):
            raise BadSource("g_idx permutes the input columns (desc_act), which is not supported")
        words = qzeros + _ONES[bits] if self.less_one else qzeros
        zeros = unpack_words(words, bits, out).T.contiguous()
        middle_everywhere(zeros, scheme)
        codes = unpack_words(qweight.T.contiguous(), bits, columns)
        return AffineLinear(scheme, codes, scales.T.contiguous(), zeros)

    def reads(self, config: Mapping[str, Any]) -> bool:
        # Files that do not say are of before there was a second version.
        written = config.get("checkpoint_format", "gptq")
        return config.get("quant_method") == "gptq" and (
            written == self.checkpoint_format or (written != "gptq_v2" and self.less_one)
        )

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        if "g_idx" not in tensors:
            raise BadSource("g_idx is missing")
        _, out = tensors["qweight"].shape
        return out, tensors["g_idx"].elements

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        common = Counter(layers.values()).most_common(1)[0][0]
        assert common is not None
        dynamic: dict[str, dict[str, Any]] = {f"-:{_exactly(name)}": {} for name in kept if name != "lm_head"}
        for name, scheme in layers.items():
            if scheme is not None and scheme != common:
                dynamic[f"+:{_exactly(name)}"] = _numbers(scheme)
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            **_numbers(common),
            "sym": common.symmetric,
            "desc_act": False,
            "lm_head": False,
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"quantserve:{_version()}"]},
        }

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        fields.only(config, "checkpoint_format", self.checkpoint_format)
        fields.only(config, "pack_dtype", "int32")
        fields.only(config, "is_marlin_format", False)
        default = _scheme(config, {})
        head = fields.flag(config, "lm_head", False)
        dynamic = fields.table(config, "dynamic")
        found: dict[str, Scheme | None] = {}
        for name in modules:
            scheme = _override(config, dynamic, name, default)
            if scheme is not None and (head or name != "lm_head"):
                found[name] = scheme
        return found


def _group_of_column(columns: int, scheme: Scheme, device: torch.device) -> Tensor:
    return torch.arange(columns, dtype=torch.int32, device=device) // scheme.width(columns)


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group or -1}


def _override(config: fields.Config, dynamic: fields.Config, name: str, default: Scheme) -> Scheme | None:
    """What the first of GPTQModel's `dynamic` patterns that fits makes of the module; None: it is kept."""
    for pattern in dynamic:
        sign, rest = pattern[:2], pattern[2:]
        if sign not in ("+:", "-:"):
            sign, rest = "+:", pattern
        if fields.starts(rest, name):
            return None if sign == "-:" else _scheme(config, fields.table(dynamic, pattern))
    return default


def _scheme(config: fields.Config, override: fields.Config) -> Scheme:
    merged = {**config, **override}
    fields.only(merged, "bits", 4, 8)
    group = fields.group_size(merged, 128)
    if fields.flag(merged, "desc_act", False) and group is not None:
        fields.unread("desc_act", True, "false: columns in their own order")
    return Scheme(bits=merged.get("bits", 4), group=group, symmetric=fields.flag(merged, "sym", True))


def _version() -> str:
    try:
        return version("quantserve")
    except PackageNotFoundError:  # run from a checkout
        return "0"


GPTQ = GptqFormat("gptq", "gptq", less_one=True)
GPTQ_V2 = GptqFormat("gptq-v2", "gptq_v2", less_one=False)
