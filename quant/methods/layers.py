"""Weights out of a block and, quantized, back into it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.errors import BadSource
from quant.layer import QuantizedLinear
from quant.methods.base import Block, LayerPlan
from quant.scheme import Scheme


def float_weight(block: Block, linear: str) -> Tensor:
    """A float32 copy. Raises BadSource naming the linear for NaN or infinite weights."""
    weight = block.linears[linear].weight.detach().to(torch.float32, copy=True)
    if not bool(torch.isfinite(weight).all()):
        raise BadSource(f"{block.name}.{linear}.weight: it has NaN or infinite values")
    return weight


def affine_scheme(block: Block, linear: str, plan: LayerPlan) -> Scheme:
    assert plan.scheme is not None, f"{block.name}.{linear}: an affine method needs a scheme"
    return plan.scheme


def install(block: Block, layers: Mapping[str, QuantizedLinear]) -> None:
    """The block computes with the dequantized weights from now on."""
    for name, layer in layers.items():
        block.linears[name].weight.data.copy_(layer.dequantize())
