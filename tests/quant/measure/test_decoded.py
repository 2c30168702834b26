"""Folders as scorers: what transformers computes from the checkpoint, or from what its files decode to."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quant.errors import BadSource
from quant.formats import registry
from quant.measure.decoded import int8_by_token, int8_with_outliers, torch_scorer
from quant.numerics import round_to_nearest
from quant.scheme import Scheme
from tests.quant.gguf.support import checkpoint, reference, rewrite, worst

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 400, 40)]
SCHEME = Scheme(bits=4, group=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(
        tmp_path_factory.mktemp("source"), transformers.Qwen2ForCausalLM, tie_word_embeddings=True
    )


def quantized(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """A folder with one packed linear; gives back the weights that it stands for."""
    target.mkdir()
    form, weights = registry.load("compressed-tensors"), load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    layer = round_to_nearest(weights[f"{name}.weight"], SCHEME, torch.float32)
    stands_for = {**weights, f"{name}.weight": layer.dequantize()}
    del weights[f"{name}.weight"]
    weights |= {f"{name}.{suffix}": tensor for suffix, tensor in form.pack(layer).items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = tuple(key.removesuffix(".weight") for key in weights if key.endswith("proj.weight"))
    (target / "config.json").write_text(
        json.dumps({**config, "quantization_config": form.config({name: SCHEME}, kept)})
    )
    return stands_for


def test_a_checkpoint(folder: Path) -> None:
    with torch_scorer(folder, threads=1) as scorer:
        assert worst(scorer(TOKENS), reference(folder, TOKENS)) < 1e-5


def test_a_variant(folder: Path, tmp_path: Path) -> None:
    weights = quantized(folder, tmp_path / "packed")
    same = tmp_path / "same"
    same.mkdir()
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    (same / "config.json").write_text((folder / "config.json").read_text())
    with torch_scorer(tmp_path / "packed", threads=1) as packed, torch_scorer(same, threads=1) as plain:
        ours, theirs = packed(TOKENS), plain(TOKENS)
    assert worst(ours, theirs) < 1e-5
    assert worst(ours, reference(folder, TOKENS)) > 1e-3


def test_tensors_that_are_no_part_of_the_model(folder: Path, tmp_path: Path) -> None:
    quantized(folder, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(BadSource, match=r"missing keys: .?model\.norm"), torch_scorer(tmp_path / "broken"):
        pass
    rewrite(tmp_path / "broken" / "config.json", num_hidden_layers=4)
    with pytest.raises(BadSource, match="transformers refuses"), torch_scorer(tmp_path / "broken"):
        pass


def test_activations() -> None:
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    step = inputs.abs().amax(dim=-1, keepdim=True) / 127
    assert ((int8_by_token(inputs) - inputs).abs() <= step).all()
    inputs[..., 3] *= 100
    changed = int8_with_outliers(inputs)
    assert torch.equal(changed[..., 3], inputs[..., 3])
    rest = torch.cat([inputs[..., :3], inputs[..., 4:]], dim=-1)
    step = rest.abs().amax() / 127
    assert ((changed - inputs).abs() <= step).all()
