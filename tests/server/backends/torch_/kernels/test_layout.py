"""Packing and its inverse: any shape, both orders of nibbles, scales as files store them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.layer import AffineLinear, CodebookLinear, Int8Linear, NestedScales, QuantizedLinear
from quant.scheme import Scheme
from server.backends.torch_.kernels import layout
from server.backends.torch_.kernels.packed import CannotPack, concatenate, pack

shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))


def codes(shape: tuple[int, int], top: int) -> torch.Tensor:
    return torch.randint(0, top + 1, shape, dtype=torch.uint8)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([layout.PAIRED, layout.PLAIN]))
def test_four_bits_come_back(shape: tuple[int, int], order: tuple[int, ...]) -> None:
    given_codes = codes(shape, 15)
    back = layout.unpack4(layout.pack4(given_codes, order), order)
    assert torch.equal(back[: shape[0], : shape[1]], given_codes)
    assert not back[shape[0] :].any()
    assert not back[:, shape[1] :].any()


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_eight_bits_come_back(shape: tuple[int, int]) -> None:
    given_codes = codes(shape, 255)
    assert torch.equal(layout.unpack8(layout.pack8(given_codes))[: shape[0], : shape[1]], given_codes)


def test_a_lane_holds_what_the_picture_says() -> None:
    """Lane 4g + t: rows g and g + 8, columns 8t.. and 32 + 8t.., the even ones in the low nibbles."""
    matrix = torch.zeros(16, 64, dtype=torch.uint8)
    row, column = 8 + 3, 32 + 8 * 2 + 5
    matrix[row, column] = 9
    words = layout.pack4(matrix)
    lane, word, nibble = 4 * 3 + 2, 2 * 1 + 1, 4 + 5 // 2
    assert int(words[0, 0, lane, word]) & 0xFFFFFFFF == 9 << (4 * nibble)
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_sixteen_bits_stay_exact(dtype: torch.dtype) -> None:
    scales = (torch.rand(33, 5) * torch.logspace(-6, 3, 33)[:, None]).to(dtype).float()
    zeros = codes((33, 5), 255)
    words = layout.pack_scales(scales, zeros, 7)
    found, found_zeros = layout.unpack_scales(words)
    assert torch.equal(found[:33, :5], scales)
    assert torch.equal(found_zeros[:33, :5], zeros)
    assert not found[:, 5:].any()


def affine(bits: int, group: int | None, symmetric: bool, shape: tuple[int, int]) -> AffineLinear:
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    grid = (shape[0], scheme.groups(shape[1]))
    zeros = torch.full(grid, scheme.middle, dtype=torch.uint8) if symmetric else codes(grid, scheme.top)
    return AffineLinear(scheme, codes(shape, scheme.top), torch.rand(grid).half(), zeros)


def nf4(shape: tuple[int, int], nested: bool) -> CodebookLinear:
    blocks = shape[0] * shape[1] // 64
    absmax: torch.Tensor | NestedScales = torch.rand(blocks)
    if nested:
        absmax = NestedScales(
            codes((1, blocks), 255)[0], torch.rand(-(-blocks // 256)), torch.rand(256), 0.5, 256
        )
    return CodebookLinear("nf4", codes(shape, 15), torch.linspace(-1, 1, 16), 64, absmax, torch.float16)


LAYERS: list[QuantizedLinear] = [
    affine(4, 128, False, (48, 256)),
    affine(4, 96, True, (20, 288)),  # written as groups of 32
    affine(4, None, False, (17, 200)),
    affine(4, 256, False, (16, 1024)),
    affine(8, None, True, (33, 104)),
    affine(8, 64, False, (8, 192)),
    nf4((24, 128), nested=False),
    nf4((24, 192), nested=True),
    Int8Linear(codes((30, 136), 255).view(torch.int8).clamp_min(-127), torch.rand(30)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}-{tuple(layer.shape)}")
def test_packed_layers_mean_what_they_meant(layer: QuantizedLinear) -> None:
    torch.testing.assert_close(pack(layer).dequantize(), layer.dequantize(), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}-{tuple(layer.shape)}")
def test_layers_with_one_input_become_one(layer: QuantizedLinear) -> None:
    both = concatenate([layer, layer]).dequantize()
    torch.testing.assert_close(both, torch.cat([layer.dequantize()] * 2))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(CannotPack, match="16-byte"):
        pack(affine(4, None, True, (16, 100)))
    with pytest.raises(CannotPack, match="groups of 16"):
        pack(affine(4, 16, True, (16, 64)))
    with pytest.raises(CannotPack, match="3 bits"):
        pack(affine(3, 128, True, (16, 128)))
    with pytest.raises(CannotPack, match="different schemes"):
        concatenate([affine(4, 128, True, (16, 128)), affine(4, 64, True, (16, 128))])
