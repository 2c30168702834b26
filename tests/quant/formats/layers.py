"""Layers of every kind that a format stores."""

import torch
from torch import Tensor

from quant import numerics
from quant.formats import registry
from quant.formats.base import Format
from quant.layer import AffineLinear, CodebookLinear, Int8Linear, NestedScales, QuantizedLinear
from quant.scheme import Scheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (32, 64, 128)
SCHEMES = {
    "awq": [Scheme(bits=4, group=group, symmetric=False) for group in GROUPS],
    "gptq": [Scheme(bits=bits, group=group) for bits in (4, 8) for group in (*GROUPS, None)],
    "compressed-tensors": [
        Scheme(bits=bits, group=group, symmetric=symmetric)
        for bits, symmetric in ((4, True), (4, False), (8, True))
        for group in (*GROUPS, None)
    ],
    "compressed-tensors-int8": [Scheme(bits=8, group=None)],
}
PAIRS = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]


def label(value: object) -> str:
    if not isinstance(value, Scheme):
        return str(value)
    return f"w{value.bits}{'' if value.symmetric else 'a'}g{value.group or 'row'}"


def weights(seed: int, out: int, columns: int, kind: str) -> Tensor:
    values = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zeros":
            return torch.zeros(out, columns)
        case "huge":
            return values * 3e4
        case _:
            return values * 0.02


def random_codes(seed: int, out: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> AffineLinear:
    """Any codes, zeros and scales, not only those that a quantizer would choose."""
    random = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    zeros = torch.randint(0, scheme.top + 1, (out, groups), dtype=torch.uint8, generator=random)
    return AffineLinear(
        scheme,
        torch.randint(0, scheme.top + 1, (out, columns), dtype=torch.uint8, generator=random),
        (torch.rand(out, groups, generator=random) + 1e-3).to(dtype),
        torch.full_like(zeros, scheme.middle) if scheme.symmetric else zeros,
    )


def affine(
    form: Format, kind: str, seed: int, shape: tuple[int, int], scheme: Scheme, source: torch.dtype
) -> AffineLinear:
    dtype = form.scale_dtype(source)
    if kind == "codes":
        return random_codes(seed, *shape, scheme, dtype)
    return numerics.round_to_nearest(weights(seed, *shape, kind), scheme, dtype)


def assert_same(one: QuantizedLinear, other: QuantizedLinear) -> None:
    """Equal to the last bit, dtypes too."""
    assert type(one) is type(other)
    match one, other:
        case AffineLinear(), AffineLinear():
            assert one.scheme == other.scheme
            _same(one.codes, other.codes)
            _same(one.scales, other.scales)
            _same(one.zeros, other.zeros)
        case CodebookLinear(), CodebookLinear():
            assert (one.kind, one.blocksize, one.dtype) == (other.kind, other.blocksize, other.dtype)
            _same(one.codes, other.codes)
            _same(one.codebook, other.codebook)
            _same_absmax(one.absmax, other.absmax)
        case Int8Linear(), Int8Linear():
            _same(one.codes, other.codes)
            _same(one.absmax, other.absmax)


def _same_absmax(one: Tensor | NestedScales, other: Tensor | NestedScales) -> None:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        _same(one, other)
        return
    assert (one.offset, one.blocksize) == (other.offset, other.blocksize)
    _same(one.codes, other.codes)
    _same(one.absmax, other.absmax)
    _same(one.codebook, other.codebook)


def _same(one: Tensor, other: Tensor) -> None:
    assert one.dtype is other.dtype
    assert one.shape == other.shape
    assert one.is_contiguous()
    assert other.is_contiguous()
    assert torch.equal(one, other)


def form(name: str) -> Format:
    return registry.load(name)
