"""The methods of bitsandbytes' formats, which look at no activations."""

import pytest
import torch

from quant.layer import CodebookLinear, Int8Linear, NestedScales
from quant.methods.int8 import mixed_matmul
from quant.numerics import encode_blockwise, encode_rows_int8
from tests.quant.methods.models import block_of, random_model, run


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_blocks_of_64_with_scales_quantized_or_not(kind: str, nested: bool) -> None:
    model = random_model("Qwen2ForCausalLM").bfloat16()
    block = block_of(model)
    weight = block.linears["mlp.down_proj"].weight.clone()
    result = run(kind, block, None, None, double_quant=float(nested))
    layer = result.layers["mlp.down_proj"]
    assert isinstance(layer, CodebookLinear)
    assert isinstance(layer.absmax, NestedScales) == nested
    assert torch.equal(layer.codes, encode_blockwise(weight, kind, 64, nested).codes)
    assert layer.dtype == torch.bfloat16
    assert torch.equal(block.linears["mlp.down_proj"].weight, layer.dequantize().bfloat16())
    assert {record.method for record in result.records} == {kind}


def test_int8_rows() -> None:
    model = random_model("LlamaForCausalLM")
    block = block_of(model)
    weight = block.linears["self_attn.o_proj"].weight.clone()
    layer = run("int8", block, None, None).layers["self_attn.o_proj"]
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.absmax, weight.abs().amax(1))
    assert (layer.dequantize() - weight).abs().max() <= layer.absmax.max() / 127 / 2 * 1.001


def test_outliers_in_floating_point_save_the_output() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 256, generator=generator)
    x[:, 17] *= 40.0
    weight = torch.randn(96, 256, generator=generator) * 0.05
    layer, exact = encode_rows_int8(weight), x @ weight.T

    def error(threshold: float) -> float:
        return float((mixed_matmul(x, layer, threshold) - exact).norm() / exact.norm())

    assert error(6.0) < 0.01
    assert error(torch.inf) > 2 * error(6.0)
    assert mixed_matmul(torch.zeros(2, 256), layer).abs().max() == 0
