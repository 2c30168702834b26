"""compressed-tensors' pack-quantized: codes of a few bits packed along the input, activations as they are.

Layout: compressed_tensors/compressors/pack_quantized/base.py and helpers.py. Codes are signed there and
stored with 2^(bits-1) added, which is what a layer holds.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.formats import compressed, fields
from quant.formats.base import Tensors
from quant.formats.limits import GROUPS, Limits, whole_groups
from quant.formats.packing import pack_words, unpack_words, words
from quant.formats.tensors import FLOATS, stored_bytes, take
from quant.layer import AffineLinear, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme


class PackQuantized:
    name = "compressed-tensors"
    marker = "weight_packed"
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    limits = Limits(schemes=frozenset({(4, True), (4, False), (8, True)}), groups=(*GROUPS, None))

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        return self.limits.refuse(self.name, shape, scheme)

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return source

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, AffineLinear)
        bits = layer.scheme.bits
        tensors = {
            "weight_packed": pack_words(layer.codes, bits),
            "weight_scale": layer.scales.contiguous(),
            "weight_shape": torch.tensor(layer.shape, dtype=torch.int64),
        }
        if not layer.scheme.symmetric:
            tensors["weight_zero_point"] = pack_words(layer.zeros.T, bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> AffineLinear:
        scheme = whole_groups(shape, scheme)
        out, columns = shape
        if "weight_g_idx" in tensors:
            raise BadSource(
                "weight_g_idx permutes the input columns (actorder group), which is not supported"
            )
        packed = take(tensors, "weight_packed", (out, words(columns, scheme.bits)), torch.int32)
        scales = take(tensors, "weight_scale", (out, scheme.groups(columns)), *FLOATS)
        written = take(tensors, "weight_shape", (2,), torch.int64, torch.int32)
        if tuple(written.tolist()) != shape:
            raise BadSource(f"weight_shape says {written.tolist()}, not {list(shape)}")
        codes = unpack_words(packed, scheme.bits, columns)
        return AffineLinear(scheme, codes, scales.contiguous(), _zeros(tensors, scales, scheme))

    def reads(self, config: Mapping[str, Any]) -> bool:
        return compressed.reads("pack-quantized", config)

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """Read from the file: the width of what is packed does not always tell it."""
        return _read_shape(tensors)

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        return compressed.write_config("pack-quantized", layers, kept, inputs=None)

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        return compressed.read_schemes("pack-quantized", config, modules, _read_group)


def _read_group(group: fields.Config) -> Scheme:
    fields.only(group, "input_activations", None)
    return compressed.read_weights(group, strategies=("group", "channel"), bits=(4, 8))


def _read_shape(tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    written = tensors.get("weight_shape")
    if written is None:
        raise BadSource("weight_shape is missing")
    if written.dtype not in ("I64", "I32") or written.elements != 2:
        raise BadSource(f"weight_shape is {written.dtype} {list(written.shape)}, not I64 [2]")
    raw = stored_bytes(written)
    half = len(raw) // 2
    return (
        int.from_bytes(raw[:half], "little", signed=True),
        int.from_bytes(raw[half:], "little", signed=True),
    )


def _zeros(tensors: Tensors, scales: Tensor, scheme: Scheme) -> Tensor:
    out, groups = scales.shape
    if scheme.symmetric:
        return torch.full((out, groups), scheme.middle, dtype=torch.uint8, device=scales.device)
    found = tensors.get("weight_zero_point")
    if found is not None and found.dtype is torch.int8:  # not packed: releases before 0.10
        whole = take(tensors, "weight_zero_point", (out, groups), torch.int8)
        return (whole.to(torch.int16) + scheme.middle).to(torch.uint8)
    packed = take(tensors, "weight_zero_point", (words(out, scheme.bits), groups), torch.int32)
    return unpack_words(packed.T.contiguous(), scheme.bits, out).T.contiguous()


PACK_QUANTIZED = PackQuantized()
