"""Weights as they are: bf16, fp16 or fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from server.backends.torch_.kernels.linear import wide_product


class PlainLinear(nn.Module):
    """y = x weight^T + bias, weight [out, in]. `wide`: y in float32, which the sums are on a GPU anyway."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, *, wide: bool = False) -> Tensor:
        if not wide or x.dtype == torch.float32:
            return linear(x, self.weight, self.bias)
        if not x.is_cuda:
            return linear(x, self.weight, self.bias).float()
        out = wide_product(x.flatten(0, -2), self.weight, self.bias)
        return out.view(*x.shape[:-1], len(self.weight))  # of no rows, -1 would be any number


class Head(PlainLinear):
    """Logits, on a GPU in float32 whatever the weights are.

    Between 16 and 32 float16 has steps of 1/64 and bfloat16 of 1/8, which is most of what a logprob would be
    off by.
    """

    def forward(self, x: Tensor, *, wide: bool = True) -> Tensor:
        return super().forward(x, wide=wide and x.is_cuda)


def join_plain(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Layers that share their input as one matrix, in the dtype that computes. Always a copy."""
    rows = sum(len(weight) for weight in weights)
    out = torch.empty((rows, weights[0].shape[1]), dtype=dtype, device=device)
    place = 0
    for weight in weights:
        out[place : place + len(weight)].copy_(weight)
        place += len(weight)
    return out
