"""What we write is what other people's readers decode, bit for bit; ours finds and decodes it too."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from quant import numerics
from quant.formats.modules import QuantizedModule
from quant.scheme import Scheme
from tests.quant.formats.folders import found_modules, linears, model, write_folder
from tests.quant.formats.layers import assert_same, form, label

W4, W8 = Scheme(bits=4), Scheme(bits=8)


def stored(folder: Path, module: QuantizedModule) -> dict[str, Tensor]:
    file = load_file(folder / "model.safetensors")
    return {suffix: file[info.name] for suffix, info in module.tensors.items()}


def check_ours(folder: Path, layers: dict[str, Any]) -> None:
    """Our loader finds every layer by config and headers and has it back exactly."""
    found = found_modules(folder)
    assert set(found) == set(layers)
    for name, module in found.items():
        assert module.shape == layers[name].shape
        assert_same(module.unpack(stored(folder, module)), layers[name])


def load(folder: Path, **options: Any) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    return loaded


COMPRESSED = [
    ("llama", torch.bfloat16, "compressed-tensors", W4),
    ("qwen2", torch.float16, "compressed-tensors", Scheme(bits=4, group=32, symmetric=False)),
    ("qwen2", torch.bfloat16, "compressed-tensors", Scheme(bits=4, group=None, symmetric=False)),
    ("llama", torch.float32, "compressed-tensors", Scheme(bits=8, group=64)),
    ("llama", torch.bfloat16, "compressed-tensors", Scheme(bits=8, group=None)),
    ("qwen2", torch.bfloat16, "compressed-tensors-int8", Scheme(bits=8, group=None)),
]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("family", "dtype", "name", "scheme"), COMPRESSED, ids=label)
def test_transformers_decodes_compressed_tensors(
    family: str, dtype: torch.dtype, name: str, scheme: Scheme, tmp_path: Path
) -> None:
    made = model(family, dtype)
    layers = write_folder(tmp_path, made, form(name), dict.fromkeys(linears(made), scheme))
    check_ours(tmp_path, layers)
    theirs = linears(load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)))
    for module, layer in layers.items():
        assert theirs[module].weight.dtype is dtype
        assert torch.equal(theirs[module].weight, layer.dequantize().to(dtype)), module
        if family == "qwen2" and "self_attn.q" in module:
            assert torch.equal(theirs[module].bias, linears(made)[module].bias)


def test_transformers_decodes_a_mix_of_schemes_and_kept_layers(tmp_path: Path) -> None:
    made = model("llama", torch.bfloat16)
    names = list(linears(made))
    schemes = {name: W8 if "down_proj" in name else W4 for name in names if "v_proj" not in name}
    layers = write_folder(tmp_path, made, form("compressed-tensors"), schemes)
    check_ours(tmp_path, layers)
    loaded = load(tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        theirs = loaded(tokens).logits  # compressed-tensors decompresses at the first forward
        for name, layer in layers.items():
            linears(made)[name].weight.copy_(layer.dequantize())
            assert torch.equal(linears(loaded)[name].weight, linears(made)[name].weight), name
        assert torch.allclose(theirs, made(tokens).logits, atol=1e-2)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_compressed_tensors_converts_awq(family: str, group: int, tmp_path: Path) -> None:
    """Its converter reads AutoAWQ's layout with code of its own."""
    made = model(family, torch.float16)
    scheme = Scheme(bits=4, group=group, symmetric=False)
    layers = write_folder(tmp_path, made, form("awq"), dict.fromkeys(linears(made), scheme))
    check_ours(tmp_path, layers)
    converter = AutoAWQConverter.from_pretrained(str(tmp_path))
    converted = converter.process(load_file(tmp_path / "model.safetensors"))
    config = converter.update_config(None)
    assert isinstance(config, QuantizationConfig)
    (group_config,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, layer in layers.items():
        state = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in converted.items()
            if key.startswith(f"{name}.weight")
        }
        theirs = compressor.decompress(state, group_config)["weight"]
        assert torch.equal(theirs, layer.dequantize().half()), name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_transformers_decodes_bitsandbytes_blocks(kind: str, double: bool, tmp_path: Path) -> None:
    made = model("qwen2", torch.bfloat16)
    layers = write_folder(tmp_path, made, form("bnb4"), dict.fromkeys(linears(made)), kind, double)
    check_ours(tmp_path, layers)
    loaded = load(tmp_path)
    for name, layer in layers.items():
        module = loaded.get_submodule(name)
        assert isinstance(module, bitsandbytes.nn.Linear4bit)
        assert module.weight.quant_state.nested is double
        assert torch.equal(dequantize_bnb_weight(module.weight), layer.dequantize().bfloat16()), name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_itself_writes_the_same_bytes(kind: str, double: bool) -> None:
    """What its Linear4bit saves before any forward, for which some CPUs lay the weight out anew."""
    plain = linears(model("llama", torch.bfloat16))["model.layers.0.mlp.down_proj"]
    theirs = bitsandbytes.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=False, compress_statistics=double, quant_type=kind
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        plain.weight.detach().clone(), requires_grad=False, compress_statistics=double, quant_type=kind
    )
    saved = theirs.to("cpu").state_dict()
    ours = form("bnb4").pack(numerics.encode_blockwise(plain.weight.detach(), kind, 64, double))
    assert set(saved) == set(ours)
    if double:  # its kernel for CPUs does not always choose the nearest
        assert int((saved.pop("weight.absmax").int() - ours["weight.absmax"].int()).abs().max()) <= 1
    for name, tensor in saved.items():
        assert torch.equal(ours[name], tensor), name


def test_transformers_decodes_bitsandbytes_rows(tmp_path: Path) -> None:
    made = model("qwen2", torch.bfloat16)
    layers = write_folder(tmp_path, made, form("bnb8"), dict.fromkeys(linears(made)))
    check_ours(tmp_path, layers)
    loaded = load(tmp_path)
    for name, layer in layers.items():
        module = loaded.get_submodule(name)
        assert isinstance(module, bitsandbytes.nn.Linear8bitLt)
        assert torch.equal(dequantize_bnb_weight(module.weight, module.state), layer.dequantize()), name


@pytest.mark.parametrize("name", ["bnb4", "bnb8"])
def test_files_of_transformers_are_read(name: str, tmp_path: Path) -> None:
    """Quantized and saved by transformers and bitsandbytes, then found and decoded here."""
    made = model("llama", torch.bfloat16)
    made.save_pretrained(tmp_path / "plain")
    four = name == "bnb4"
    options = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "down_proj"],
    )
    loaded = load(tmp_path / "plain", quantization_config=options)
    loaded.save_pretrained(tmp_path / "saved")
    found = found_modules(tmp_path / "saved")
    assert set(found) == {module for module in linears(made) if "down_proj" not in module}
    for module, ours in found.items():
        assert ours.format.name == name
        quantized = loaded.get_submodule(module)
        state = None if four else quantized.state
        theirs = dequantize_bnb_weight(quantized.weight, state)
        layer = ours.unpack(stored(tmp_path / "saved", ours))
        assert torch.equal(layer.dequantize().to(theirs.dtype), theirs), module
