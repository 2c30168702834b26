"""Scales that clip: a group's range shrunk to where the rounding error is least."""

import torch
from torch import Tensor

from quant.layer import AffineLinear
from quant.numerics import affine_parameters, encode, grouped, ranges
from quant.scheme import Scheme

SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))  # 1.0 down to 0.6


def searched_parameters(
    weight: Tensor, importance: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] with the least squared error of the weights, each column's weighed
    by `importance` [in] (the Hessian's diagonal: the error of the output, if inputs were uncorrelated)."""
    low, high = ranges(weight, scheme)
    best = torch.full_like(low, torch.inf)
    scales, zeros = affine_parameters(weight, scheme, scale_dtype, low, high)
    for shrink in SHRINKS:
        some = affine_parameters(weight, scheme, scale_dtype, low * shrink, high * shrink)
        error = _squared_error(weight, importance, scheme, *some)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, some[0], scales), torch.where(better, some[1], zeros)
    return scales, zeros


def _squared_error(
    weight: Tensor, importance: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor
) -> Tensor:
    """[out, groups]"""
    layer = AffineLinear(scheme, encode(weight, scales, zeros, scheme), scales, zeros)
    difference = layer.dequantize().sub_(weight)
    return grouped(difference.square_().mul_(importance), scheme).sum(2)


def by_column(values: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[out, groups] -> float32 [out, in]."""
    return values.float().repeat_interleave(scheme.width(columns), dim=1)[:, :columns]
