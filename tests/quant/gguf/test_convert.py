"""Converting: what is written, and what is refused before anything is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant.errors import BadSource, QuantError, UnsupportedArchitecture
from quant.gguf import convert as module
from quant.gguf import floats
from quant.gguf.convert import FloatType, convert, prepare
from tests.quant.gguf.support import checkpoint, converted, llama_logits, reference, rewrite, source_of, worst

LLAMA = transformers.LlamaForCausalLM
TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "source", LLAMA, dtype="bfloat16")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def respell(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, tmp_path: Path, kind: type[QuantError] = BadSource) -> str:
    target = tmp_path / "refused.gguf"
    with pytest.raises(kind) as caught:
        converted(folder, target)
    assert not target.exists()
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("float_type", ["f32", "f16", "bf16"])
def test_types_bytes_and_progress(llama: Path, float_type: FloatType, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "one.gguf"
    convert(
        source_of(llama),
        target,
        float_type=float_type,
        progress=lambda done, total: seen.append((done, total)),
    )

    reader = GGUFReader(target)
    for tensor in reader.tensors:
        wanted = float_type.upper() if len(tensor.shape) > 1 else "F32"
        assert tensor.tensor_type.name == wanted, tensor.name
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1] == sum(tensor.n_bytes for tensor in reader.tensors)
    assert target.read_bytes() == converted(llama, tmp_path / "two.gguf", float_type).read_bytes()


def test_the_size_of_slabs_changes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converted(llama, tmp_path / "whole.gguf", "f16").read_bytes()
    monkeypatch.setattr(module, "SLAB", 1000)
    assert converted(llama, tmp_path / "slabs.gguf", "f16").read_bytes() == whole


def test_the_folder_of_the_checkpoint_is_not_in_the_file(llama: Path, copy: Path, tmp_path: Path) -> None:
    here, there = converted(llama, tmp_path / "1.gguf"), converted(copy, tmp_path / "2.gguf")
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings(same: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", LLAMA, tie_word_embeddings=True)

    def add_head(weights: dict[str, torch.Tensor]) -> None:
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.clone() if same else embedding.flip(0).contiguous()

    respell(folder, add_head)
    target = converted(folder, tmp_path / "f32.gguf")

    assert ("output.weight" in {tensor.name for tensor in GGUFReader(target).tensors}) is not same
    assert worst(llama_logits(target, TOKENS), reference(folder, TOKENS)) <= 2e-3


def test_old_buffers_are_passed_over(copy: Path, tmp_path: Path) -> None:
    respell(
        copy, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    converted(copy, tmp_path / "f32.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("float_type", ["f32", "f16", "bf16"])
def test_a_number_that_is_none_stops_with_its_tensor(
    copy: Path, value: float, dtype: torch.dtype, float_type: FloatType, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name].to(dtype)
        weights[name][5, 7] = value

    respell(copy, spoil)
    with pytest.raises(BadSource, match=rf"^model.safetensors: tensor .{name}. has NaN or infinite"):
        converted(copy, tmp_path / "bad.gguf", float_type)
    assert not (tmp_path / "bad.gguf").exists()


def test_what_float16_cannot_hold_is_said(copy: Path, tmp_path: Path) -> None:
    respell(copy, lambda weights: weights["model.embed_tokens.weight"].fill_(1e6))
    with pytest.raises(BadSource, match=r"embed_tokens.*65,504"):
        converted(copy, tmp_path / "f16.gguf", "f16")
    converted(copy, tmp_path / "bf16.gguf", "bf16")


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "FalconForCausalLM", "Gemma3ForConditionalGeneration", ""]
)
def test_other_architectures_are_refused_by_name(name: str, copy: Path, tmp_path: Path) -> None:
    rewrite(copy / "config.json", architectures=[name])
    message = refusal(copy, tmp_path, UnsupportedArchitecture)
    assert repr(name) in message
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in message


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "full-precision"),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layers"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "negative": ({"hidden_size": -64}, "hidden_size"),
    "no number": ({"num_hidden_layers": "three"}, "num_hidden_layers"),
    "truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    "endless": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "odd head": ({"head_dim": 15}, "even"),
    "heads": ({"num_key_value_heads": 3}, "multiple"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "wrong shape": ({"intermediate_size": 97}, "mlp"),
    "many layers": ({"num_hidden_layers": 600}, "512"),
    "fewer layers": ({"num_hidden_layers": 2}, "layers.2"),
    "bias missing": ({"attention_bias": True}, "bias"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_cannot_be_kept_are_refused(name: str, copy: Path, tmp_path: Path) -> None:
    changes, words = CONFIGS[name]
    rewrite(copy / "config.json", **changes)
    assert words in refusal(copy, tmp_path)


def test_tensors_that_do_not_belong_are_named(copy: Path, tmp_path: Path) -> None:
    respell(copy, lambda weights: weights.update({"model.layers.0.mlp.extra": torch.ones(3)}))
    assert "model.layers.0.mlp.extra" in refusal(copy, tmp_path)


def test_a_missing_tensor_is_named(copy: Path, tmp_path: Path) -> None:
    respell(copy, lambda weights: weights.__delitem__("lm_head.weight"))
    assert "lm_head.weight" in refusal(copy, tmp_path)


def test_integers_are_no_weights(copy: Path, tmp_path: Path) -> None:
    def to_int8(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)

    respell(copy, to_int8)
    assert "I8" in refusal(copy, tmp_path)


def test_what_a_graph_lacks_is_refused(tmp_path: Path) -> None:
    qwen3 = transformers.Qwen3ForCausalLM
    biased = checkpoint(tmp_path / "biased", qwen3, attention_bias=True)
    assert "bias in self_attn.o_proj" in refusal(biased, tmp_path)
    narrow = checkpoint(
        tmp_path / "narrow", qwen3, use_sliding_window=True, sliding_window=8, max_window_layers=0
    )
    assert "sliding window" in refusal(narrow, tmp_path)


def test_a_wide_window_limits_the_context_instead(tmp_path: Path) -> None:
    config: dict[str, Any] = {"sliding_window": 5000, "max_position_embeddings": 32768}
    folder = checkpoint(tmp_path / "source", transformers.MistralForCausalLM, **config)
    shape = prepare(source_of(folder)).shape
    assert (shape.graph.arch, shape.context, shape.window) == ("llama", 5000, None)


def test_null_means_none_and_absent_means_the_default(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
    }
    folder = checkpoint(tmp_path / "source", transformers.MistralForCausalLM, **config)
    path = folder / "config.json"
    nulls = {**json.loads(path.read_text()), "sliding_window": None, "num_key_value_heads": None}
    path.write_text(json.dumps(nulls))
    shape = prepare(source_of(folder)).shape
    assert (shape.context, shape.kv_heads) == (32768, 4)

    del nulls["sliding_window"]
    path.write_text(json.dumps(nulls))
    assert prepare(source_of(folder)).shape.context == 4096


ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@settings(deadline=None)
@given(
    st.lists(ANY_FLOAT, min_size=1, max_size=50), st.sampled_from(list(TORCH)), st.sampled_from(list(TORCH))
)
def test_floats_round_as_torch_rounds(values: list[float], kind: str, wanted: str) -> None:
    stored = torch.tensor(values, dtype=torch.float32).to(TORCH[kind])
    if not torch.isfinite(stored).all():
        return
    raw = stored.view(torch.int16 if kind != "f32" else torch.float32).numpy().view(floats.STORED[kind])
    rounded = stored.to(TORCH[wanted])
    if not torch.isfinite(rounded).all():
        with pytest.raises(ValueError, match=r"range|NaN or infinity"):
            floats.convert(raw, kind, wanted)
        return
    expected = rounded.view(torch.int16 if wanted != "f32" else torch.float32).numpy()
    ours = floats.convert(raw, kind, wanted)
    assert np.array_equal(ours.view(expected.dtype), expected)


def test_config_and_index_come_from_strangers(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    refusal(copy, tmp_path)
