"""What is quantized is found by config.json and headers; what does not fit together is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant import numerics
from quant.errors import BadSource
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.safetensors_header import merge_headers
from quant.scheme import Scheme
from tests.quant.formats.layers import form, weights

W4A = Scheme(bits=4, group=32, symmetric=False)
W4 = Scheme(bits=4, group=32)
NAME = "model.layers.0.mlp.up_proj"


def tensors_of(name: str, scheme: Scheme | None) -> dict[str, Tensor]:
    weight = weights(1, 16, 64, "normal")
    if name == "bnb4":
        return form(name).pack(numerics.encode_blockwise(weight, "nf4"))
    assert scheme is not None
    return form(name).pack(numerics.round_to_nearest(weight, scheme, torch.float16))


def find(
    folder: Path, name: str, scheme: Scheme | None, tensors: dict[str, Tensor], **config: Any
) -> dict[str, QuantizedModule]:
    named = {f"{NAME}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file(named | {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    sample = numerics.encode_blockwise(torch.ones(1, 64), "nf4")
    quantization = form(name).config({NAME: scheme}, (), sample) | config
    return quantized_modules(
        {"quantization_config": quantization}, merge_headers([folder / "model.safetensors"])
    )


def test_a_checkpoint_without_quantization_has_none() -> None:
    assert quantized_modules({}, {}) == {}


@pytest.mark.parametrize("config", [[], "awq", {"quant_method": []}])
def test_a_strange_quantization_config_is_refused(config: Any) -> None:
    with pytest.raises(BadSource, match="quantization_config"):
        quantized_modules({"quantization_config": config}, {})


@pytest.mark.parametrize(
    ("name", "scheme"), [("awq", W4A), ("gptq", W4), ("compressed-tensors", W4A), ("bnb4", None)]
)
def test_the_bias_is_no_part_of_the_module(name: str, scheme: Scheme | None, tmp_path: Path) -> None:
    tensors = tensors_of(name, scheme)
    found = find(tmp_path, name, scheme, tensors | {"bias": torch.zeros(16)})
    assert set(found) == {NAME}
    assert (found[NAME].shape, found[NAME].scheme) == ((16, 64), scheme)
    assert set(found[NAME].tensors) == set(tensors)


def test_what_config_keeps_must_not_be_quantized_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=f"'{NAME}' is quantized in the file, but config.json says"):
        find(tmp_path, "awq", W4A, tensors_of("awq", W4A), modules_to_not_convert=["mlp"])


@pytest.mark.parametrize(
    ("name", "scheme", "changes", "why"),
    [
        ("gptq", W4, {"g_idx": None}, "g_idx is missing"),
        ("gptq", W4, {"qweight": torch.zeros(8, dtype=torch.int32)}, "its weight is no matrix"),
        ("compressed-tensors", W4, {"weight_shape": None}, "weight_shape is missing"),
        ("compressed-tensors", W4, {"weight_shape": torch.ones(3)}, "weight_shape is F32 [3], not I64 [2]"),
        ("compressed-tensors", W4, {"weight_shape": torch.tensor([-1, 64])}, "is said to be -1 x 64"),
        (
            "bnb4",
            None,
            {"weight.quant_state.bitsandbytes__nf4": None},
            "quant_state of nf4 or fp4 is missing",
        ),
        (
            "bnb4",
            None,
            {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"[[[["), dtype=torch.uint8)},
            "quant_state of nf4 is not its JSON",
        ),
        (
            "bnb4",
            None,
            {"weight.quant_state.bitsandbytes__nf4": torch.zeros(5000, dtype=torch.uint8)},
            "has 5,000 bytes, not a few",
        ),
    ],
)
def test_tensors_that_say_no_shape_are_named(
    name: str, scheme: Scheme | None, changes: dict[str, Tensor | None], why: str, tmp_path: Path
) -> None:
    changed = tensors_of(name, scheme) | changes
    tensors = {suffix: tensor for suffix, tensor in changed.items() if tensor is not None}
    with pytest.raises(BadSource) as caught:
        find(tmp_path, name, scheme, tensors)
    assert why in str(caught.value)
    assert NAME in str(caught.value)


def test_a_refusal_to_unpack_names_the_module(tmp_path: Path) -> None:
    tensors = tensors_of("awq", W4A)
    found = find(tmp_path, "awq", W4A, tensors)
    with pytest.raises(BadSource, match=f"'{NAME}': scales is missing"):
        found[NAME].unpack({"qweight": tensors["qweight"], "qzeros": tensors["qzeros"]})


def test_zero_points_that_older_writers_did_not_pack_are_read(tmp_path: Path) -> None:
    tensors = tensors_of("compressed-tensors", W4A)
    layer = form("compressed-tensors").unpack(tensors, (16, 64), W4A)
    plain = (layer.zeros.int() - 8).to(torch.int8)  # type: ignore[union-attr]
    again = form("compressed-tensors").unpack(tensors | {"weight_zero_point": plain}, (16, 64), W4A)
    assert torch.equal(again.dequantize(), layer.dequantize())
