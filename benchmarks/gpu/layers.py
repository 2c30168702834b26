"""Random quantized layers for checks and timings: only their shapes matter."""

import torch

from quant.layer import AffineLinear, CodebookLinear, Int8Linear
from quant.scheme import Scheme

NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


def affine(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device) -> AffineLinear:
    """Scales as a file of this dtype stores them."""
    grid = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, scheme.top + 1, shape, dtype=torch.uint8, device=device)
    scales = ((torch.rand(grid, device=device) + 0.1) * 0.04 / scheme.top).to(dtype)
    if scheme.symmetric:
        zeros = torch.full(grid, scheme.middle, dtype=torch.uint8, device=device)
    else:
        zeros = torch.randint(0, scheme.top + 1, grid, dtype=torch.uint8, device=device)
    return AffineLinear(scheme, codes, scales, zeros)


def nf4(shape: tuple[int, int], blocksize: int, device: torch.device) -> CodebookLinear:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    absmax = torch.rand(shape[0] * shape[1] // blocksize, device=device) * 0.05 + 0.01
    return CodebookLinear("nf4", codes, torch.tensor(NF4, device=device), blocksize, absmax, torch.float16)


def int8(shape: tuple[int, int], device: torch.device) -> Int8Linear:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return Int8Linear(codes, torch.rand(shape[0], device=device) * 0.05 + 0.01)
