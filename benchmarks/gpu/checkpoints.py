"""Checkpoints to check and time the torch backend with: tiny-chat in every format, a random 7B shape."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.formats import registry
from quant.layer import QuantizedLinear
from quant.numerics import encode_blockwise, encode_rows_int8, round_to_nearest
from quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Kind:
    """A format of files, the scheme that it needs to be told, and how a weight becomes a layer of it."""

    form: str
    scheme: Scheme | None
    quantize: Callable[[Tensor], QuantizedLinear]


def _affine(form: str, bits: int, group: int | None, *, symmetric: bool) -> Kind:
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    return Kind(form, scheme, lambda weight: round_to_nearest(weight, scheme, torch.float16))


KINDS = {
    "awq": _affine("awq", 4, 128, symmetric=False),
    "gptq": _affine("gptq", 4, 128, symmetric=True),
    "gptq8": _affine("gptq", 8, 128, symmetric=True),
    "w4a16": _affine("compressed-tensors", 4, 128, symmetric=True),
    "w8a16": _affine("compressed-tensors", 8, None, symmetric=True),
    "nf4": Kind("bnb4", None, lambda weight: encode_blockwise(weight, "nf4")),
    "fp4": Kind("bnb4", None, lambda weight: encode_blockwise(weight, "fp4")),
    "int8": Kind("bnb8", None, encode_rows_int8),
    "w8a8": _affine("compressed-tensors-int8", 8, None, symmetric=True),
}
WEIGHT_ONLY = tuple(kind for kind in KINDS if kind not in {"int8", "w8a8"})


def quantized(folder: Path, source: Path, kind: Kind) -> Path:
    """A checkpoint of `source` whose linear layers are rounded."""
    form = registry.load(kind.form)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, QuantizedLinear] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or form.refuse((tensor.shape[0], tensor.shape[1]), kind.scheme):
            tensors[key] = tensor
            continue
        layers[module] = kind.quantize(tensor)
        tensors |= {f"{module}.{name}": part.contiguous() for name, part in form.pack(layers[module]).items()}
    config = json.loads((source / "config.json").read_text())
    sample = next(iter(layers.values()))
    config["quantization_config"] = form.config(dict.fromkeys(layers, kind.scheme), ("lm_head",), sample)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LINEARS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}  # fmt: skip
LAYERS, WIDTH, VOCABULARY = 32, 4096, 32000


def llama_7b(folder: Path, kind: Kind | None) -> Path:
    """Llama-2-7B's shape, fp16 or quantized; every decoder layer has a copy of the same random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    layer, sample = _decoder_layer(kind)
    where: dict[str, str] = {}
    for index in range(LAYERS):
        named = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        _write(folder / f"model-{index:02}.safetensors", named, where)
    edges = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH).half(),
        "model.norm.weight": torch.ones(WIDTH).half(),
        "lm_head.weight": (torch.randn(VOCABULARY, WIDTH) * 0.02).half(),
    }
    _write(folder / "model-edges.safetensors", edges, where)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = dict(CONFIG)
    if kind is not None and sample is not None:
        modules = [f"model.layers.{index}.{name}" for index in range(LAYERS) for name in LINEARS]
        form = registry.load(kind.form)
        config["quantization_config"] = form.config(dict.fromkeys(modules, kind.scheme), ("lm_head",), sample)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _decoder_layer(kind: Kind | None) -> tuple[dict[str, Tensor], QuantizedLinear | None]:
    norms = ("input_layernorm", "post_attention_layernorm")
    tensors = {f"{name}.weight": torch.ones(WIDTH).half() for name in norms}
    sample = None
    for name, shape in LINEARS.items():
        weight = torch.randn(shape, device="cuda") * 0.015
        if kind is None:
            tensors[f"{name}.weight"] = weight.half().cpu()
            continue
        sample = kind.quantize(weight.half())
        packed = registry.load(kind.form).pack(sample)
        tensors |= {f"{name}.{suffix}": part.contiguous().cpu() for suffix, part in packed.items()}
    return tensors, sample


def _write(path: Path, tensors: Mapping[str, Tensor], where: dict[str, str]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    where |= dict.fromkeys(tensors, path.name)


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
    "intermediate_size": 11008,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float16", "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
