"""int8 weights times activations that are rounded to int8 row by row as they come.

SmoothQuant's dynamic scheme (arXiv:2211.10438). On CPUs LLM.int8's, too (arXiv:2208.07339): what a row has
from a threshold on is multiplied apart, in float64.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quant.layer import AffineLinear, Int8Linear, QuantizedLinear
from server.backends.torch_.kernels.activations import quantize_rows, scale_sums
from server.backends.torch_.kernels.packed import CannotPack

FEWEST_ROWS = 32  # cuBLAS multiplies int8 matrices of more than 16 rows, in multiples of 8
EXACT_COLUMNS = 1024  # 1024 x 127 x 128 < 2^24: float32 holds any sum of so many products


@dataclass(frozen=True, slots=True, eq=False)
class Signed8:
    """weight = codes * scales, a scale for each row."""

    codes: Tensor  # int8 [rows, columns]
    scales: Tensor  # float32 [rows]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> "Signed8":
        return Signed8(self.codes.to(device), self.scales.to(device))


def sign(layer: QuantizedLinear) -> Signed8:
    """A layer of 8 bits, symmetric, with one scale a row. Raises CannotPack."""
    if isinstance(layer, Int8Linear):
        return Signed8(layer.codes.contiguous(), layer.absmax.float() / 127.0)
    if not isinstance(layer, AffineLinear) or layer.scheme.bits != 8 or not layer.scheme.symmetric:
        raise CannotPack("int8 activations need symmetric 8-bit weights")
    if layer.scales.shape[1] != 1:
        raise CannotPack("int8 activations need weights with one scale a row")
    codes = (layer.codes.to(torch.int16) - layer.scheme.middle).to(torch.int8)
    return Signed8(codes, layer.scales[:, 0].float())


def linear(
    x: Tensor, weight: Signed8, bias: Tensor | None = None, threshold: float = math.inf, *, wide: bool = False
) -> Tensor:
    """x [..., columns] -> [..., rows] in x's dtype, or float32 if `wide`.

    The products and sums of codes are exact integers.
    """
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    outliers = None if threshold == math.inf else _outliers(flat, threshold)
    inside = flat if outliers is None else torch.where(flat.abs() < threshold, flat, 0.0)
    codes, scales = quantize_rows(inside)
    sums = multiply(codes, weight.codes)
    out = scale_sums(sums, scales, weight.scales, bias, x.dtype, wide=wide)
    if outliers is not None:
        _add_outliers(out, flat, sums, scales, weight, bias, outliers)
    return out.view(*x.shape[:-1], rows)


def _outliers(x: Tensor, threshold: float) -> Tensor | None:
    """Which numbers are; None for none at all."""
    found = x.abs() >= threshold
    return found if bool(found.any()) else None


def _add_outliers(
    out: Tensor,
    x: Tensor,
    sums: Tensor,
    scales: Tensor,
    weight: Signed8,
    bias: Tensor | None,
    outliers: Tensor,
) -> None:
    """Compute the rows that have outliers anew, with them.

    A float32 times a code has 32 bits. float64 adds such numbers exactly unless one is 2^10 times another
    and there are hundreds of them: also here the order, and so the batch, does not matter.
    """
    rows = outliers.any(1).nonzero()[:, 0]
    columns = outliers.any(0).nonzero()[:, 0]
    some = torch.where(outliers, x, 0.0)[rows][:, columns].double()
    total = some @ weight.codes[:, columns].double().T
    total += sums[rows].double() * scales[rows, None].double()
    total *= weight.scales.double()
    if bias is not None:
        total += bias.double()
    out[rows] = total.to(out.dtype)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """int32 left right^T of int8 matrices."""
    rows, columns = left.shape
    if left.device.type == "cpu":
        return torch._int_mm(left, right.T) if _multiplies_int8() else by_pieces(left, right)
    if left.device.type != "cuda" or columns % 8 or right.shape[0] % 8:
        return (left.double() @ right.double().T).to(torch.int32)  # 53 bits hold any such sum
    padded = max(FEWEST_ROWS, -(-rows // 8) * 8)
    if padded != rows:
        left = torch.nn.functional.pad(left, (0, 0, 0, padded - rows))
    return torch._int_mm(left, right.T)[:rows]


@cache
def _multiplies_int8() -> bool:
    """Whether this CPU's int8 products are exact: without VNNI pairs of them may be cut off at 16 bits."""
    left, right = torch.full((4, 256), 127, dtype=torch.int8), torch.full((64, 256), -128, dtype=torch.int8)
    left[2:], right[::2] = -127, 127
    try:
        return torch.equal(torch._int_mm(left, right.T), by_pieces(left, right))
    except RuntimeError:
        return False


def by_pieces(left: Tensor, right: Tensor) -> Tensor:
    """The same by float32 matrices, exact in any order, since no sum is long enough to be rounded."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for start in range(0, left.shape[1], EXACT_COLUMNS):
        piece = slice(start, start + EXACT_COLUMNS)
        total += (left[:, piece].float() @ right[:, piece].float().T).to(torch.int32)
    return total
