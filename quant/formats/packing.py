"""Codes of 4 or 8 bits in 32-bit words, the first code in the lowest bits."""

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32


def words(count: int, bits: int) -> int:
    """Words that hold so many codes."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] -> int32 [..., words(n, bits)]; what is left of the last word is 0."""
    each = WORD // bits
    codes = pad(codes, (0, -codes.shape[-1] % each))
    packed = codes.new_zeros((*codes.shape[:-1], codes.shape[-1] // each), dtype=torch.int32)
    for place in range(each):
        packed |= codes[..., place::each].to(torch.int32) << (bits * place)
    return packed


def unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [..., words(count, bits)] -> uint8 [..., count], contiguous."""
    each = WORD // bits
    codes = torch.empty((*packed.shape, each), dtype=torch.uint8, device=packed.device)
    for place in range(each):
        codes[..., place] = (packed >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()
