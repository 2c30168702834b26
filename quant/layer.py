"""The plain forms of a quantized linear layer: methods make them, formats pack and unpack them.

A weight is [out, in]. Biases are no part of it: they stay what they were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class AffineLinear:
    """weight = (code - zero) * scale."""

    scheme: Scheme
    codes: Tensor  # uint8 [out, in], 0 to scheme.top; int32 for more than 8 bits
    scales: Tensor  # [out, groups], positive, in the dtype that the file stores
    zeros: Tensor  # [out, groups] in the codes' dtype; scheme.middle everywhere if symmetric

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        columns = self.codes.shape[1]
        width = self.scheme.width(columns)
        scales = self.scales.float().repeat_interleave(width, dim=1)[:, :columns]
        zeros = self.zeros.float().repeat_interleave(width, dim=1)[:, :columns]
        return (self.codes.float() - zeros) * scales


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """Scales that are quantized too (QLoRA's double quantization): codebook[code] * absmax + offset."""

    codes: Tensor  # uint8 [blocks]
    absmax: Tensor  # float32 [ceil(blocks / blocksize)]
    codebook: Tensor  # float32 [256]
    offset: float
    blocksize: int

    def dequantize(self) -> Tensor:
        """float32 [blocks]."""
        absmax = self.absmax.repeat_interleave(self.blocksize)[: self.codes.numel()]
        return self.codebook[self.codes.long()] * absmax + self.offset


@dataclass(frozen=True, slots=True, eq=False)
class CodebookLinear:
    """weight = codebook[code] * absmax of its block; blocks run over the rows one after the other."""

    kind: str  # "nf4" or "fp4"
    codes: Tensor  # uint8 [out, in], an index into the codebook
    codebook: Tensor  # float32 [16]
    blocksize: int
    absmax: Tensor | NestedScales  # float32 [ceil(out * in / blocksize)]
    dtype: torch.dtype  # what readers decode into: the source's

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        absmax = self.absmax.dequantize() if isinstance(self.absmax, NestedScales) else self.absmax
        scales = absmax.repeat_interleave(self.blocksize)[: self.codes.numel()]
        return self.codebook[self.codes.long()] * scales.view(self.codes.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Linear:
    """LLM.int8's rows: weight = code * absmax / 127. Outliers are the activations' and found when it runs."""

    codes: Tensor  # int8 [out, in]
    absmax: Tensor  # float32 [out]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]; multiplied in bitsandbytes' order, so that the last bit is the same."""
        return self.codes.float() * self.absmax[:, None] * (1 / 127)


QuantizedLinear = AffineLinear | CodebookLinear | Int8Linear
