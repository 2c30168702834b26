"""GPTQ's solver: codes for a weight that keep X W^T rather than W.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, algorithm 1. Columns are rounded one after the other; what a column loses is made up
for by those still to come, in the proportions that the inverse of the Hessian gives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics import code_dtype
from quant.scheme import Scheme

LAZY = 128  # columns whose effect on the columns behind is applied at once
LADDER = (1.0, 3.0, 10.0, 30.0, 100.0)  # multiples of the damping that are tried


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    codes: Tensor  # uint8 [out, in]
    aimed: Tensor  # float32 [out, in]: each column as it was when it was rounded


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A damped Hessian H, rows and columns in the order in which they are rounded."""

    order: Tensor  # by falling diagonal (act-order)
    upper: Tensor  # U, upper triangular, with H^-1 = U^T U
    damping: float  # share of the mean diagonal that was added

    @property
    def pivots(self) -> Tensor:
        """float32 [in], as the columns come in the weight: what an error of 1 in that column's weight adds to
        the squared error of the output once all columns behind it have made up for what they can."""
        squares = self.upper.diagonal().square().reciprocal()
        return torch.empty_like(squares).index_copy_(0, self.order, squares)


def factor(hessian: Tensor, damping: float) -> Factored | None:
    """`hessian` without zeros on the diagonal, damped by so much of its mean, or more if that is too little.
    None where even the largest damping leaves a matrix that is not positive definite.

    With H = R R^T, R upper triangular (Cholesky from the last row up), U is R^-1: one factorization and one
    triangular inverse.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    mean, backwards = hessian.diagonal().mean(), order.flip(0)
    for rung in LADDER:
        damped = hessian[backwards][:, backwards]
        damped.diagonal().add_(damping * rung * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            root = lower.flip(0, 1)
            del lower
            eye = torch.eye(len(root), device=root.device)
            return Factored(order, torch.linalg.solve_triangular(root, eye, upper=True), damping * rung)
    return None


def solve(weight: Tensor, factored: Factored, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Solution:
    """`weight` float32 [out, in]; `scales`, `zeros` float32 [out, in], by column."""
    order, upper = factored.order, factored.upper
    columns = weight.T[order].contiguous()  # [in, out]: a column is contiguous
    codes = torch.empty(columns.shape, dtype=code_dtype(scheme.bits), device=weight.device)
    aimed = torch.empty_like(columns)
    for start in range(0, len(order), LAZY):
        now, later = slice(start, start + LAZY), slice(start + LAZY, None)
        grid = scales.T[order[now]], zeros.T[order[now]]
        lost = _round_columns(columns[now], upper[now, now], grid, scheme.top, codes[now])
        aimed[now] = columns[now]
        columns[later].addmm_(upper[now, later].T, lost, alpha=-1)
    back = torch.argsort(order)
    return Solution(codes[back].T.contiguous(), aimed[back].T.contiguous())


def _round_columns(
    columns: Tensor, upper: Tensor, grid: tuple[Tensor, Tensor], top: int, codes: Tensor
) -> Tensor:
    """Rounds `columns` [n, out] from the first to the last in place; fills `codes`; returns what was lost,
    each column's divided by the diagonal."""
    lost = torch.empty_like(columns)
    scales, zeros = grid
    inverse = 1.0 / scales
    diagonal = 1.0 / upper.diagonal()
    for i in range(len(columns)):
        column = columns[i]
        code = torch.addcmul(zeros[i], column, inverse[i]).round_().clamp_(0, top)
        codes[i] = code
        torch.sub(column, code.sub_(zeros[i]).mul_(scales[i]), out=lost[i])
        lost[i].mul_(diagonal[i])
        columns[i + 1 :].addr_(upper[i, i + 1 :], lost[i], alpha=-1)
    return lost
