"""Torch formats as scorers: transformers computes in float32 with the weights that the files decode to.

What a format does to activations when it runs (int8 per token, LLM.int8's outliers) is done here too.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from quant.checkpoint import checkpoint_tensors, read_config
from quant.errors import BadSource
from quant.families import family_of
from quant.files import shown
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.measure.score import Scorer, Singles
from quant.safetensors_header import TensorInfo

OUTLIER = 6.0  # bitsandbytes' llm_int8_threshold


@contextmanager
def torch_scorer(folder: Path, *, threads: int | None = None) -> Iterator[Scorer]:
    """A checkpoint, quantized or not. Raises BadSource and UnsupportedArchitecture."""
    model = decoded_model(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    try:
        yield scorer_of(model)
    finally:
        torch.set_num_threads(before)


def scorer_of(model: nn.Module) -> Scorer:
    """Any causal model of transformers, on any device."""
    device = next(model.parameters()).device

    def score(tokens: Sequence[int]) -> Singles:
        with torch.inference_mode():
            output = model(torch.tensor([list(tokens)], device=device), use_cache=False)
        logits: Singles = output.logits[0].float().cpu().numpy()
        return logits

    return score


def decoded_model(folder: Path) -> nn.Module:
    """transformers' model in float32, its quantized linears holding decoded weights."""
    config, architecture = read_config(folder)
    tensors = checkpoint_tensors(folder)
    modules = quantized_modules(config, tensors)
    model = _model(config, architecture, _weights(tensors, modules))
    for name, module in modules.items():
        if change := ACTIVATIONS.get(module.format.name):
            model.get_submodule(name).register_forward_pre_hook(_changing(change))
    return model


def _model(config: Mapping[str, Any], architecture: str, weights: dict[str, Tensor]) -> nn.Module:
    transformers.utils.logging.disable_progress_bar()
    family = family_of(architecture)
    classes = import_module(family.package)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        known = getattr(classes, f"{family.config or family.prefix}Config").from_dict(plain)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        first = str(error).strip().rpartition("\n")[2].strip()
        raise BadSource(f"config.json: transformers refuses it: {first:.200}") from error
    model, loaded = getattr(classes, architecture).from_pretrained(
        None,
        config=known,
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[what])):
            raise BadSource(f"{what.replace('_', ' ')}: {shown(names[0])}")
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def _weights(tensors: Mapping[str, TensorInfo], modules: Mapping[str, QuantizedModule]) -> dict[str, Tensor]:
    """Every tensor of the model by transformers' name, in float32."""
    packed = {info.name for module in modules.values() for info in module.tensors.values()}
    weights = {name: _read(info).float() for name, info in tensors.items() if name not in packed}
    for name, module in modules.items():
        parts = {suffix: _read(info) for suffix, info in module.tensors.items()}
        weights[f"{name}.weight"] = module.unpack(parts).dequantize().float()
    return weights


def _read(info: TensorInfo) -> Tensor:
    from safetensors import safe_open

    with safe_open(info.file, "pt") as file:
        tensor: Tensor = file.get_tensor(info.name)
    return tensor


def _changing(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return lambda _module, inputs: change(inputs[0])


def int8_by_token(inputs: Tensor) -> Tensor:
    """What compressed-tensors' dynamic int8 makes of activations: symmetric, a scale for each token."""
    scales = inputs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127.5
    return (inputs / scales).round().clamp(-128, 127) * scales


def int8_with_outliers(inputs: Tensor) -> Tensor:
    """LLM.int8 (arXiv:2208.07339, section 3.2): columns with a value beyond OUTLIER stay as they are."""
    outliers = (inputs.abs() >= OUTLIER).flatten(0, -2).any(dim=0)
    inliers = inputs.masked_fill(outliers, 0.0)
    scales = inliers.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.where(outliers, inputs, (inliers / scales).round() * scales)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"compressed-tensors-int8": int8_by_token, "bnb8": int8_with_outliers}
)
