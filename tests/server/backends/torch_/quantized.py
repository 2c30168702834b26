"""Checkpoints of every format, made of a plain one by rounding: what matters here is how they are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.formats import registry
from quant.layer import QuantizedLinear
from quant.numerics import encode_blockwise, encode_rows_int8, round_to_nearest
from quant.scheme import Scheme

Quantize = Callable[[Tensor], QuantizedLinear]


def affine(bits: int, group: int | None, *, symmetric: bool) -> tuple[Scheme, Quantize]:
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    return scheme, lambda weight: round_to_nearest(weight, scheme, torch.float16)


# name -> format, scheme, how to quantize a weight
KINDS: dict[str, tuple[str, Scheme | None, Quantize]] = {
    "nf4": ("bnb4", None, lambda w: encode_blockwise(w, "nf4")),
    "fp4": ("bnb4", None, lambda w: encode_blockwise(w, "fp4", double_quant=False)),
    "int8": ("bnb8", None, encode_rows_int8),
    "awq": ("awq", *affine(4, 64, symmetric=False)),
    "gptq4": ("gptq", *affine(4, 128, symmetric=True)),
    "gptq8": ("gptq", *affine(8, 128, symmetric=True)),
    "w4a16": ("compressed-tensors", *affine(4, 32, symmetric=True)),
    "w8a16": ("compressed-tensors", *affine(8, None, symmetric=True)),
    "w8a8": ("compressed-tensors-int8", *affine(8, None, symmetric=True)),
}
WEIGHT_ONLY = tuple(kind for kind in KINDS if kind not in {"int8", "w8a8"})


def write(folder: Path, source: Path, kind: str, shards: int = 1) -> dict[str, QuantizedLinear]:
    """A checkpoint of `source` under `kind`; its quantized layers by module."""
    name, scheme, quantize = KINDS[kind]
    form = registry.load(name)
    tensors, layers = {}, {}
    for key, tensor in plain_tensors(source).items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or form.refuse((tensor.shape[0], tensor.shape[-1]), scheme):
            tensors[key] = tensor
            continue
        layers[module] = quantize(tensor)
        packed = form.pack(layers[module])
        tensors |= {f"{module}.{suffix}": part.contiguous() for suffix, part in packed.items()}
    assert layers
    config = json.loads((source / "config.json").read_text())
    sample = next(iter(layers.values()))
    config["quantization_config"] = form.config(dict.fromkeys(layers, scheme), ("lm_head",), sample)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    _save(tensors, folder, shards)
    return layers


def plain_tensors(source: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(source.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _save(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    """Of about equal sizes."""
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total, done, places = sum(tensor.nbytes for tensor in tensors.values()), 0, dict[str, str]()
    for name, tensor in tensors.items():
        places[name] = f"model-{min(shards, 1 + done * shards // total):05}-of-{shards:05}.safetensors"
        done += tensor.nbytes
    for file in set(places.values()):
        part = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_decoded(folder: Path, source: Path, layers: dict[str, QuantizedLinear]) -> Path:
    """The same checkpoint with the weights that the codes mean, in float32 and without quantization."""
    tensors = {key: tensor.float() for key, tensor in plain_tensors(source).items()}
    tensors |= {f"{module}.weight": layer.dequantize() for module, layer in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
