"""Weights as they are: bf16, fp16 or fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class PlainLinear(nn.Module):
    """y = x weight^T + bias, weight [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def join_plain(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Layers that share their input as one matrix, in the dtype that computes. Always a copy."""
    rows = sum(len(weight) for weight in weights)
    out = torch.empty((rows, weights[0].shape[1]), dtype=dtype, device=device)
    place = 0
    for weight in weights:
        out[place : place + len(weight)].copy_(weight)
        place += len(weight)
    return out
