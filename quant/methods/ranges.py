"""Scales that clip: a group's range shrunk to where the rounding error is least."""

from collections.abc import Callable

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
    by `importance` [in]: for GPTQ what it cannot make up for."""

    def error(difference: Tensor) -> Tensor:
        return grouped(difference.square_().mul_(importance), scheme).sum(2)

    return _search(weight, scheme, scale_dtype, error)


def clipped_parameters(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same by the error of the output that each group alone would make: its own square of the Hessian."""
    squares = _diagonal_squares(hessian, scheme)

    def error(difference: Tensor) -> Tensor:
        blocks = grouped(difference, scheme).transpose(0, 1)  # [groups, out, width]
        return (blocks @ squares).mul_(blocks).sum(2).T

    return _search(weight, scheme, scale_dtype, error)


def _diagonal_squares(hessian: Tensor, scheme: Scheme) -> Tensor:
    """[groups, width, width]; zeros where the last group has no columns."""
    columns, width = len(hessian), scheme.width(len(hessian))
    squares = hessian.new_zeros(scheme.groups(columns), width, width)
    for square, start in zip(squares, range(0, columns, width), strict=True):
        part = hessian[start : start + width, start : start + width]
        square[: len(part), : len(part)] = part
    return squares


def _search(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, error_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`error_of` takes [out, in] differences of the weights and gives [out, groups]."""
    low, high = ranges(weight, scheme)
    best = torch.full_like(low, torch.inf)
    scales, zeros = affine_parameters(weight, scheme, scale_dtype, low, high)
    for shrink in SHRINKS:
        some = affine_parameters(weight, scheme, scale_dtype, low * shrink, high * shrink)
        layer = AffineLinear(scheme, encode(weight, *some, scheme), *some)
        error = error_of(layer.dequantize().sub_(weight))
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, some[0], scales), torch.where(better, some[1], zeros)
    return scales, zeros


def by_column(values: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[out, groups] -> float32 [out, in]."""
    return values.float().repeat_interleave(scheme.width(columns), dim=1)[:, :columns]
