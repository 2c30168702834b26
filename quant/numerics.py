"""From weights to codes and back: affine integers, bitsandbytes' blocks and LLM.int8's rows.

Affine: weight = (code - zero) * scale with codes 0 to 2^bits - 1. Ranges always hold zero, so that zero stays
zero. Scales are rounded to the dtype that the file stores before any code is computed with them.

Symmetric schemes have their zero point in the middle, m = 2^(bits-1), and one of two scales:

    full range   max|w| / (m - 1/2)   codes 0 to 2m-1. The step of compressed-tensors' and GPTQ's own
                                      quantizers: both ends are half a step off, like any other weight.
    restricted   max|w| / (m - 1)     codes 1 to 2m-1: +-max|w| is met, steps are 1 / (2m - 2) wider.

Files do not say which one was used, and every reader takes both.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.codebooks import codebook, dynamic_map
from quant.layer import AffineLinear, CodebookLinear, Int8Linear, NestedScales
from quant.scheme import Scheme

NESTED_BLOCK = 256
# The least scale: below it float16 has few bits left, and 1/scale overflows. Where scales have float32's
# exponents it only keeps a row of zeros from dividing by zero.
_FLOORS = {torch.float16: 1e-5}
_FLOOR = 1e-20


def code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """float32 [out, groups, width]; a shorter last group is filled with zeros, which every range holds."""
    out, columns = weight.shape
    width = scheme.width(columns)
    groups = scheme.groups(columns)
    return pad(weight.float(), (0, groups * width - columns)).view(out, groups, width)


def ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(least, greatest) weight of each group, float32 [out, groups]."""
    low, high = grouped(weight, scheme).aminmax(dim=-1)
    return low, high


def affine_parameters(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    restricted: bool = False,
) -> tuple[Tensor, Tensor]:
    """(scales in `scale_dtype`, zeros), both [out, groups], of a [out, in] weight.

    `low` and `high` are the range that codes shall span where it is not the weight's own: anything that
    broadcasts to [out, groups], so one number each makes it per tensor. Weights outside are clipped; so are
    those that no finite scale reaches.
    """
    if low is None or high is None:
        low, high = ranges(weight, scheme)
    shape = weight.shape[0], scheme.groups(weight.shape[1])
    low = low.float().clamp(max=0.0).expand(shape)
    high = high.float().clamp(min=0.0).expand(shape)
    if scheme.symmetric:
        reach = torch.maximum(-low, high)
        scales = _store(reach / (scheme.middle - (1.0 if restricted else 0.5)), scale_dtype)
        return scales, torch.full_like(reach, scheme.middle, dtype=code_dtype(scheme.bits))
    scales = _store((high - low) / scheme.top, scale_dtype)
    zeros = (-low / scales.float()).round().clamp(0, scheme.top)
    return scales, zeros.to(code_dtype(scheme.bits))


def _store(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales.clamp(_FLOORS.get(dtype, _FLOOR), torch.finfo(dtype).max).to(dtype)


def encode(
    weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, *, restricted: bool = False
) -> Tensor:
    """Nearest codes [out, in] (ties to even); `weight` may be any columns that start with a group."""
    codes = nearest(
        grouped(weight, scheme), scales[..., None], zeros[..., None], scheme, restricted=restricted
    )
    return codes.flatten(1)[:, : weight.shape[1]].contiguous()


def nearest(
    weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, *, restricted: bool = False
) -> Tensor:
    """Nearest codes where scales and zeros broadcast to the weight.

    Rounds the signed code, as compressed-tensors does: that decides ties and near ties.
    """
    middle = scheme.middle
    signed = weight.float() / scales.float() + (zeros.float() - middle)
    bottom = 1 - middle if restricted and scheme.symmetric else -middle
    return (signed.round_().clamp_(bottom, middle - 1) + middle).to(code_dtype(scheme.bits))


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 weights where scales and zeros broadcast to the codes."""
    return (codes.float() - zeros.float()) * scales.float()


def round_to_nearest(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, restricted: bool = False
) -> AffineLinear:
    scales, zeros = affine_parameters(weight, scheme, scale_dtype, restricted=restricted)
    return AffineLinear(scheme, encode(weight, scales, zeros, scheme, restricted=restricted), scales, zeros)


def encode_blockwise(
    weight: Tensor,
    kind: str,
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
) -> CodebookLinear:
    """NF4 or FP4 exactly as bitsandbytes' own code for CPUs makes it.

    `dtype` is what readers shall decode into; the weight's own if None.
    """
    book = codebook(kind, weight.device)
    absmax, scaled = _blocks(weight.flatten(), blocksize)
    codes = _nearest_in(scaled, book)[: weight.numel()].view(weight.shape)
    nested = _nest(absmax) if double_quant else absmax
    return CodebookLinear(kind, codes, book, blocksize, nested, dtype or weight.dtype)


def _blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(absmax of each block, values in [-1, 1] with the last block filled up), float32 and flat.

    A shorter last block is divided, the others are multiplied by the reciprocal, as bitsandbytes does.
    """
    tail = values.numel() % blocksize
    blocks = pad(values.float(), (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    divisors = absmax.clamp(min=1e-38)[:, None]
    scaled = blocks * (1.0 / divisors)
    if tail:
        scaled[-1] = blocks[-1] / divisors[-1]
    return absmax, scaled.clamp_(-1.0, 1.0).flatten()


def _nearest_in(values: Tensor, book: Tensor) -> Tensor:
    """uint8 index of the nearest entry; of two equally near ones that of the lesser."""
    order = torch.argsort(book, stable=True)
    ascending = book[order]
    return order[torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2.0)].to(torch.uint8)


def _nest(absmax: Tensor) -> NestedScales:
    """QLoRA's double quantization: the mean is taken off, the rest goes to 8 bits in blocks of 256."""
    offset = absmax.mean()
    outer, scaled = _blocks(absmax - offset, NESTED_BLOCK)
    book = dynamic_map(absmax.device)
    codes = _nearest_in(scaled, book)[: absmax.numel()]
    return NestedScales(codes, outer, book, offset.item(), NESTED_BLOCK)


def encode_rows_int8(weight: Tensor) -> Int8Linear:
    """LLM.int8's weights (arXiv 2208.07339): 127 steps up to the largest weight of each row."""
    weight = weight.float()
    absmax = weight.abs().amax(dim=1)
    steps = 127.0 / absmax.clamp(min=1e-30)  # finite for a row of zeros
    return Int8Linear((weight * steps[:, None]).round().to(torch.int8), absmax)
