"""bitsandbytes' 8-bit files (LLM.int8): int8 rows and their absmax.

Layout: bitsandbytes/nn/modules.py (Linear8bitLt._save_to_state_dict). The outlier columns are the
activations' and are found when it runs; `llm_int8_threshold` says above which magnitude.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.formats import fields
from quant.formats.base import Tensors
from quant.formats.bnb_config import quantized, write_config
from quant.formats.tensors import take
from quant.layer import Int8Linear, QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

THRESHOLD = 6.0
_ROWS = 0  # the only weight_format that is still written


class Bnb8:
    name = "bnb8"
    marker = "SCB"
    suffixes = ("weight", "SCB", "weight_format")

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        return None if scheme is None else f"{self.name} has a scheme of its own"

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        return torch.float32

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert isinstance(layer, Int8Linear)
        return {
            "weight": layer.codes.contiguous(),
            "SCB": layer.absmax.contiguous(),
            "weight_format": torch.tensor(_ROWS, dtype=torch.uint8),
        }

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> Int8Linear:
        weight = take(tensors, "weight", shape, torch.int8)
        absmax = take(tensors, "SCB", (shape[0],), torch.float32)
        form = tensors.get("weight_format")
        if form is not None and (form.numel() != 1 or form.item() != _ROWS):
            raise BadSource(f"weight_format {form.tolist()} is not supported, only {_ROWS} (row)")
        return Int8Linear(weight.contiguous(), absmax.contiguous())

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "bitsandbytes" and config.get("load_in_8bit") is True

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        out, columns = tensors["weight"].shape
        return out, columns

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        return write_config(
            kept,
            load_in_4bit=False,
            load_in_8bit=True,
            llm_int8_threshold=THRESHOLD,
            llm_int8_has_fp16_weight=False,
        )

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        fields.only(config, "llm_int8_has_fp16_weight", False)
        return quantized(config, modules)


BNB8 = Bnb8()
