"""Compares GPTQModel's reading of a folder with ours, weight by weight; run in an environment that has it.

    GPTQMODEL_CPU_WORKERS=4 python tests/quant/formats/golden/read_gptq.py FOLDER

FOLDER: a checkpoint with quant_method gptq, such as a variant that was built here. See gptq.py for the
environment.
"""

import argparse
import json
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors import safe_open
from torch import Tensor, nn

from quant.checkpoint import checkpoint_tensors
from quant.formats.modules import quantized_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    ours = our_weights(folder)
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    quantized = 0
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            quantized += 1
            assert torch.equal(module.dequantize_weight().T, ours[name].half()), name
        elif isinstance(module, nn.Linear) and name in ours:
            assert torch.equal(module.weight, ours[name].half()), name
    assert quantized, "nothing is quantized"
    print(f"{folder.name}: {quantized} quantized linears are decoded to the same float16 weights")  # noqa: T201


def our_weights(folder: Path) -> dict[str, Tensor]:
    """Decoded weights of the quantized modules, and the plain ones, by module."""
    infos = checkpoint_tensors(folder)
    modules = quantized_modules(json.loads((folder / "config.json").read_text()), infos)
    weights: dict[str, Tensor] = {}
    for file in {info.file for info in infos.values()}:
        with safe_open(file, "pt") as opened:
            for name, info in infos.items():
                if info.file == file and name.endswith(".weight"):
                    weights[name.removesuffix(".weight")] = opened.get_tensor(name)
    for name, module in modules.items():
        tensors = {}
        for suffix, info in module.tensors.items():
            with safe_open(info.file, "pt") as opened:
                tensors[suffix] = opened.get_tensor(info.name)
        weights[name] = module.unpack(tensors).dequantize()
    return weights


if __name__ == "__main__":
    main()
