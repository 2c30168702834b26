"""bitsandbytes' own product of a 4-bit layer, and what it rounds on CPUs that multiply bfloat16 numbers."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant.formats import registry
from quant.layer import CodebookLinear, NestedScales

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")


@pytest.fixture(params=["nf4", "fp4"])
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    """A layer that bitsandbytes has quantized."""
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    module: nn.Module = bitsandbytes.nn.Linear4bit(256, 192, bias=False, quant_type=request.param)
    module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type=request.param)
    return module.to("cpu").eval()


def read(module: nn.Module) -> CodebookLinear:
    """The layer as our reader has it from a file; before any product, after which it would be wrong."""
    tensors = {name: part.clone() for name, part in module.state_dict().items()}
    layer = registry.load("bnb4").unpack(tensors, (192, 256), None)
    assert isinstance(layer, CodebookLinear)
    return layer


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rounded_product(layer: CodebookLinear, x: Tensor) -> Tensor:
    """Activations, scales and values in bfloat16, sums of a block in float32, the result in bfloat16."""
    scales = layer.absmax.dequantize() if isinstance(layer.absmax, NestedScales) else layer.absmax
    values = bf16(layer.codebook.float())[layer.codes.long()]
    blocks = (-1, layer.shape[1] // layer.blocksize, layer.blocksize)
    sums = torch.einsum("xbk,wbk->xwb", bf16(x).view(blocks), values.view(blocks))
    return bf16((sums * bf16(scales).view(layer.shape[0], -1)).sum(-1))


@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_our_layer_is_theirs(theirs: Any, rows: int) -> None:
    layer, x = read(theirs), torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    exact = linear(x, layer.dequantize())
    theirs.support_avx512bf16_for_cpu = False
    assert torch.allclose(theirs(x), exact, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_is_rounded_where_the_cpu_multiplies_bfloat16(theirs: Any) -> None:
    if not theirs.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    layer, x = read(theirs), torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    exact, rounded = linear(x, layer.dequantize()), rounded_product(layer, x)
    found = theirs(x)
    assert (found - rounded).abs().max() <= 2**-7 * found.abs().max()  # one step of bfloat16
    assert (found == rounded).float().mean() > 0.99
    assert (found - exact).norm() > 1e-3 * exact.norm()
