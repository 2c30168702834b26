"""int8 weights times activations that are rounded to int8 row by row as they come.

SmoothQuant's dynamic scheme (arXiv:2211.10438).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.layer import AffineLinear
from server.backends.torch_.kernels.activations import quantize_rows, scale_sums
from server.backends.torch_.kernels.packed import CannotPack

FEWEST_ROWS = 32  # cuBLAS multiplies int8 matrices of more than 16 rows, in multiples of 8


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


def sign(layer: AffineLinear) -> Signed8:
    """A symmetric layer of 8 bits, one scale a row. Raises CannotPack."""
    if layer.scheme.bits != 8 or not layer.scheme.symmetric or layer.scales.shape[1] != 1:
        raise CannotPack("int8 activations need symmetric 8-bit weights with one scale a row")
    codes = (layer.codes.to(torch.int16) - layer.scheme.middle).to(torch.int8)
    return Signed8(codes, layer.scales[:, 0].float())


def linear(x: Tensor, weight: Signed8, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] -> [..., rows] in x's dtype. The products and sums are exact integers."""
    rows, columns = weight.shape
    codes, scales = quantize_rows(x.reshape(-1, columns))
    sums = multiply(codes, weight.codes)
    return scale_sums(sums, scales, weight.scales, bias, x.dtype).view(*x.shape[:-1], rows)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """int32 left right^T of int8 matrices."""
    rows, columns = left.shape
    if left.device.type != "cuda" or columns % 8 or right.shape[0] % 8:
        return (left.double() @ right.double().T).to(torch.int32)  # 53 bits hold any such sum
    padded = max(FEWEST_ROWS, -(-rows // 8) * 8)
    if padded != rows:
        left = torch.nn.functional.pad(left, (0, 0, 0, padded - rows))
    return torch._int_mm(left, right.T)[:rows]
