"""Small random models as folders that other people's loaders open."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from quant import numerics
from quant.checkpoint import checkpoint_tensors
from quant.formats.base import Format
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.layer import QuantizedLinear
from quant.scheme import Scheme

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}


def model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Weights of N(0, 0.02); Qwen2 has biases, which are no zeros here."""
    torch.manual_seed(7)
    made = (
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
        if family == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    )
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return made.to(dtype).eval()


def linears(made: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks."""
    return {
        name: module
        for name, module in made.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def quantize(
    form: Format, scheme: Scheme | None, linear: nn.Linear, kind: str, double: bool
) -> QuantizedLinear:
    weight = linear.weight.detach()
    match form.name:
        case "bnb4":
            return numerics.encode_blockwise(weight, kind, double_quant=double)
        case "bnb8":
            return numerics.encode_rows_int8(weight)
        case _:
            assert scheme is not None
            return numerics.round_to_nearest(weight, scheme, form.scale_dtype(weight.dtype))


def write_folder(
    folder: Path,
    made: PreTrainedModel,
    form: Format,
    schemes: Mapping[str, Scheme | None],
    kind: str = "nf4",
    double: bool = True,
) -> dict[str, QuantizedLinear]:
    """config.json and model.safetensors of the model with the modules of `schemes` quantized."""
    plain = linears(made)
    layers = {name: quantize(form, scheme, plain[name], kind, double) for name, scheme in schemes.items()}
    tensors = {
        name: tensor.contiguous()
        for name, tensor in made.state_dict().items()
        if name.removesuffix(".weight") not in layers
        and not (name == "lm_head.weight" and made.config.tie_word_embeddings)
    }
    for name, layer in layers.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in form.pack(layer).items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = tuple(name for name in plain if name not in layers)
    config: dict[str, Any] = made.config.to_dict() | {
        "architectures": [type(made).__name__],
        "dtype": str(made.dtype).removeprefix("torch."),
        "quantization_config": form.config(schemes, kept, next(iter(layers.values()))),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def found_modules(folder: Path) -> dict[str, QuantizedModule]:
    """As a loader finds them: from config.json and headers."""
    return quantized_modules(json.loads((folder / "config.json").read_text()), checkpoint_tensors(folder))
