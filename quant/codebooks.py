"""The maps of bitsandbytes: what a code stands for, times the absmax of its block."""

from functools import cache

import torch
from torch import Tensor

# Quantiles of a normal distribution, zero among them (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# E2M1 with a sign in bit 3, in the order of bitsandbytes' codes; divided by 12.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

KINDS = ("nf4", "fp4")


def codebook(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [16] of "nf4" or "fp4"."""
    return _codebook(kind).to(device, copy=True)


@cache
def _codebook(kind: str) -> Tensor:
    if kind == "nf4":
        return torch.tensor(_NF4)
    assert kind == "fp4", kind
    positive = torch.tensor(_FP4)
    return torch.cat([positive, -positive]) / 12.0


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], ascending: bitsandbytes' signed dynamic type for scales that are quantized themselves.

    Seven decades of magnitude, with twice as many steps in each as in the one below ("8-bit Approximations
    for Parallelism in Deep Learning", arXiv 1511.04561), and 0 and 1.
    """
    return _dynamic_map().to(device, copy=True)


@cache
def _dynamic_map() -> Tensor:
    steps = [10.0 ** (decade - 6) * _middles(1 << decade) for decade in range(7)]
    positive = torch.cat(steps)
    ends = torch.tensor([0.0, 1.0])
    return torch.cat([positive, -positive, ends]).sort().values


def _middles(count: int) -> Tensor:
    edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32)
    return (edges[:-1] + edges[1:]) / 2.0
