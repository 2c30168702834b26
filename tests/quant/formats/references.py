"""What readers that nobody here wrote make of a checkpoint's quantized weights.

GPTQModel cannot be a dependency of the tests: golden/gptq.safetensors holds what it decodes, and
golden/read_gptq.py runs it on any folder. Here GPTQ's arithmetic is written down once more, with numpy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

Decoded = dict[str, Tensor]  # by module, in the type that the reader computes in


def read_by_others(folder: Path, form: str, modules: list[str]) -> Decoded:
    return READERS[form](folder, modules)


def by_transformers(folder: Path, modules: list[str]) -> Decoded:
    plain = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=plain)
    return {name: model.get_submodule(name).weight.data for name in modules}


def by_bitsandbytes(folder: Path, modules: list[str]) -> Decoded:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = {name: model.get_submodule(name) for name in modules}
    return {
        name: dequantize_bnb_weight(one.weight, getattr(one, "state", None)) for name, one in found.items()
    }


def by_awq_converter(folder: Path, modules: list[str]) -> Decoded:
    """compressed-tensors' own, of AutoAWQ's files."""
    converter: Any = AutoAWQConverter.from_pretrained(str(folder))
    converted = converter.process(_tensors(folder))
    (config,) = converter.update_config(None).config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    return {
        name: compressor.decompress(
            {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in converted.items()
                if key.startswith(f"{name}.weight")
            },
            config,
        )["weight"]
        for name in modules
    }


def by_gptq_arithmetic(folder: Path, modules: list[str]) -> Decoded:
    """Version 1: one is added to each *word* of zero points, as GPTQModel does it."""
    tensors = _tensors(folder)
    return {
        name: _gptq(*(tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")))
        for name in modules
    }


def _gptq(weight: Any, zeros: Any, scales: Any, groups: Any) -> Tensor:
    bits = 32 * weight.shape[0] // len(groups)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    codes = _unpacked(weight, bits).transpose(0, 2, 1).reshape(len(groups), -1)
    points = _unpacked(zeros.view(np.uint32) + np.uint32(ones), bits).reshape(len(zeros), -1)
    difference = (codes - points[groups]).astype(np.float16)
    return torch.from_numpy(np.ascontiguousarray((scales[groups] * difference).T))


def _unpacked(words: Any, bits: int) -> Any:
    """int64 [..., codes of a word], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.int64)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


READERS: dict[str, Callable[[Path, list[str]], Decoded]] = {
    "compressed-tensors": by_transformers,
    "compressed-tensors-int8": by_transformers,
    "awq": by_awq_converter,
    "gptq": by_gptq_arithmetic,
    "bnb4": by_bitsandbytes,
    "bnb8": by_bitsandbytes,
}
