"""Which module computes a layer, by the form of its weights and the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.layer import AffineLinear, Int8Linear, QuantizedLinear
from server.backends.torch_.kernels.packed import LLM_INT8_THRESHOLD, CannotPack, concatenate, pack
from server.backends.torch_.kernels.w8a8 import sign
from server.backends.torch_.linear.int8 import RoundedLinear, SignedLinear
from server.backends.torch_.linear.packed import PackedLinear
from server.backends.torch_.linear.plain import PlainLinear, join_plain


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model computes, in what, and whether quantized weights are unpacked while they are loaded."""

    device: torch.device
    dtype: torch.dtype
    dense: bool


def plain_linear(weights: Sequence[Tensor], bias: Tensor | None, target: Target) -> nn.Module:
    """Layers of one input, one below the other."""
    return PlainLinear(join_plain(weights, target.dtype, target.device), bias)


def quantized_linear(
    layers: Sequence[QuantizedLinear], bias: Tensor | None, target: Target, *, dynamic: bool
) -> nn.Module:
    """Layers of one input, one below the other. `dynamic`: their activations are rounded to 8 bits, too.

    Raises CannotPack for several layers that do not make one matrix.
    """
    if not target.dense or _are_int8(layers, dynamic=dynamic, device=target.device):
        try:
            return _packed(concatenate(layers), bias, target.dtype, dynamic=dynamic)
        except CannotPack:
            if len(layers) > 1:
                raise
    return _dense(layers, bias, target, dynamic=dynamic)


def _are_int8(layers: Sequence[QuantizedLinear], *, dynamic: bool, device: torch.device) -> bool:
    """Whether a CPU multiplies the codes themselves, which is faster and more exact than what they mean."""
    return device.type == "cpu" and (dynamic or isinstance(layers[0], Int8Linear))


def _packed(layer: QuantizedLinear, bias: Tensor | None, dtype: torch.dtype, *, dynamic: bool) -> nn.Module:
    """Raises CannotPack."""
    if dynamic and isinstance(layer, AffineLinear):
        return SignedLinear(sign(layer), bias)
    if isinstance(layer, Int8Linear) and layer.codes.device.type == "cpu":
        return SignedLinear(sign(layer), bias, LLM_INT8_THRESHOLD)
    return PackedLinear(pack(layer, dtype), bias)


def _dense(
    layers: Sequence[QuantizedLinear], bias: Tensor | None, target: Target, *, dynamic: bool
) -> nn.Module:
    inner = plain_linear([layer.dequantize() for layer in layers], bias, target)
    if all(isinstance(layer, Int8Linear) for layer in layers):
        return RoundedLinear(inner, LLM_INT8_THRESHOLD)
    return RoundedLinear(inner, math.inf) if dynamic else inner


def may_share(layers: Sequence[QuantizedLinear]) -> bool:
    """Whether the layers may become one matrix: of one kind, and of one scheme."""
    first = layers[0]
    same = all(type(layer) is type(first) for layer in layers)
    schemes = {layer.scheme for layer in layers if isinstance(layer, AffineLinear)}
    return same and len(schemes) <= 1
