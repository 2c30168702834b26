"""Tiny random checkpoints of every family, and what a built variant computes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quant.checkpoint import checkpoint_tensors
from quant.formats.registry import load
from quant.pipeline import Outcome, build_variant
from quant.progress import Report, ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from quant.tensors import read_tensors
from tests.quant.checkpoints import VOCABULARY, tokenizer_json, write_json
from tests.quant.methods.models import random_model

TOKENS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(3))
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCABULARY}


def family_checkpoint(folder: Path, architecture: str, **more: Any) -> Path:
    """As `save_pretrained` writes it in bfloat16, with a tokenizer."""
    sizes = SIZES | ({"head_dim": 32} if architecture != "LlamaForCausalLM" else {})
    model = random_model(architecture, **{**sizes, **more})
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text(tokenizer_json())
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    return folder


def build(
    model: Path, spec: object, cache: Path, report: Report = ignore, tokens: Tensor | None = TOKENS
) -> Outcome:
    """On one thread of the CPU, calibrated on random tokens."""
    source, store = open_source(str(model), cache=cache), VariantStore(cache)
    recipe = parse_recipe(spec, local=True)  # type: ignore[arg-type]
    return build_variant(source, recipe, store, progress=report, threads=1, device="cpu", tokens=tokens)


def decoded(variant: Path, format_name: str) -> dict[str, Tensor]:
    """The variant's weights under the names of the source's, float32, by our own reading of the folder."""
    config = json.loads((variant / "config.json").read_text())
    found = read_tensors(checkpoint_tensors(variant))
    form = load(format_name)
    shapes = linear_shapes(variant)
    weights: dict[str, Tensor] = {}
    for module, scheme in form.schemes(config["quantization_config"], shapes).items():
        names = {suffix: f"{module}.{suffix}" for suffix in form.suffixes}
        parts = {suffix: found.pop(name) for suffix, name in names.items() if name in found}
        weights[f"{module}.weight"] = form.unpack(parts, shapes[module], scheme).dequantize()
    return {**weights, **{name: tensor.float() for name, tensor in found.items()}}


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every linear of the model that transformers makes of the config, without its quantization."""
    model = _empty(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _empty(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits_of(folder: Path, weights: dict[str, Tensor] | None = None, tokens: Tensor = TOKENS) -> Tensor:
    """float32 logits of the model in `folder`, with these weights or as transformers loads it."""
    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = _empty(folder)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


@cache
def source_logits(folder: Path) -> Tensor:
    return logits_of(folder)


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(reference || other), in nats."""
    ours, theirs = reference.log_softmax(-1), other.log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())
