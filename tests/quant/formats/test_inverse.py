"""pack and unpack undo each other, over every format, scheme and odd shape."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant import numerics
from quant.errors import BadSource
from quant.formats.packing import pack_words, unpack_words, words
from quant.layer import QuantizedLinear
from quant.scheme import Scheme
from tests.quant.formats.layers import (
    FLOATS,
    PAIRS,
    affine,
    assert_same,
    form,
    label,
    random_codes,
    weights,
)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from((4, 8)), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 9))
def test_words_hold_what_was_packed(bits: int, rows: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=random)
    packed = pack_words(codes, bits)
    assert packed.shape == (rows, words(count, bits))
    assert torch.equal(unpack_words(packed, bits, count), codes)


def test_words_are_those_of_the_layout() -> None:
    """compressed-tensors stores the signed codes [-5, -5, -3, -3, 0, 0, -3, -8] as 0x05885533."""
    codes = torch.tensor([[3, 3, 5, 5, 8, 8, 5, 0]], dtype=torch.uint8)
    assert pack_words(codes, 4).item() == 0x05885533
    assert pack_words(codes[:, :4], 8).item() == 0x05050303


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(("normal", "zeros", "huge", "codes")),
    size=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 7)),
    source=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_affine_layers_come_back(
    name: str,
    scheme: Scheme,
    kind: str,
    size: tuple[int, int, int],
    source: torch.dtype,
    seed: int,
) -> None:
    rows, groups, odd = size
    tester = form(name)
    loose = name.startswith("compressed")  # packs the last word only partly where it must
    out = rows if loose else 8 * rows
    columns = groups * (scheme.group or 8) + (odd if loose and scheme.group is None else 0)
    assert tester.refuse((out, columns), scheme) is None
    layer = affine(tester, kind, seed, (out, columns), scheme, source)
    packed = tester.pack(layer)
    assert set(packed) <= set(tester.suffixes)
    assert tester.marker in packed
    assert all(tensor.is_contiguous() for tensor in packed.values())
    again = tester.unpack(packed, layer.shape, scheme)
    assert_same(again, layer)
    for suffix, tensor in tester.pack(again).items():
        assert torch.equal(tensor, packed[suffix])


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((4, 8)),
    version=st.sampled_from(("gptq", "gptq-v2")),
    rows=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_zero_points_of_gptq_files_that_others_wrote(bits: int, version: str, rows: int, seed: int) -> None:
    """Asymmetric ones are not written, but read, also where a zero borrowed from its neighbour."""
    scheme = Scheme(bits=bits, group=32, symmetric=False)
    layer = random_codes(seed, 8 * rows, 64, scheme, torch.float16)
    layer.zeros[:, 0] = 0
    tester = form(version)
    assert tester.refuse(layer.shape, scheme) is not None
    assert_same(tester.unpack(tester.pack(layer), layer.shape, scheme), layer)


@settings(max_examples=40, deadline=None)
@given(
    double=st.booleans(),
    kind=st.sampled_from(("nf4", "fp4")),
    values=st.sampled_from(("normal", "zeros", "huge")),
    out=st.integers(1, 40),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(FLOATS),
)
def test_blocks_come_back(
    double: bool, kind: str, values: str, out: int, columns: int, dtype: torch.dtype
) -> None:
    tester = form("bnb4")
    layer = numerics.encode_blockwise(weights(1, out, columns, values), kind, 64, double, dtype)
    packed = tester.pack(layer)
    assert set(packed) <= set(tester.suffixes)
    assert_same(tester.unpack(packed, layer.shape, None), layer)


@settings(max_examples=20, deadline=None)
@given(
    values=st.sampled_from(("normal", "zeros", "huge")), out=st.integers(1, 40), columns=st.integers(1, 200)
)
def test_rows_come_back(values: str, out: int, columns: int) -> None:
    tester = form("bnb8")
    layer = numerics.encode_rows_int8(weights(2, out, columns, values))
    assert_same(tester.unpack(tester.pack(layer), layer.shape, None), layer)


def one_of(name: str, scheme: Scheme | None) -> QuantizedLinear:
    weight = weights(3, 64, 128, "normal")
    match name:
        case "bnb4":
            return numerics.encode_blockwise(weight, "nf4")
        case "bnb8":
            return numerics.encode_rows_int8(weight)
        case _:
            assert scheme is not None
            return numerics.round_to_nearest(weight, scheme, form(name).scale_dtype(torch.bfloat16))


EACH = [*{name: (name, scheme) for name, scheme in PAIRS}.values(), ("bnb4", None), ("bnb8", None)]


@pytest.mark.parametrize(("name", "scheme"), EACH, ids=label)
def test_a_file_holds_them(name: str, scheme: Scheme | None, tmp_path: Path) -> None:
    layer = one_of(name, scheme)
    save_file(form(name).pack(layer), tmp_path / "layer.safetensors")
    stored = load_file(tmp_path / "layer.safetensors")
    assert_same(form(name).unpack(stored, layer.shape, scheme), layer)


@pytest.mark.parametrize(("name", "scheme"), EACH, ids=label)
def test_tensors_that_are_not_what_was_promised_are_refused(name: str, scheme: Scheme | None) -> None:
    layer = one_of(name, scheme)
    tester = form(name)
    packed = tester.pack(layer)
    optional = {"weight_format"}
    for suffix in set(packed) - optional:
        without = {key: tensor for key, tensor in packed.items() if key != suffix}
        with pytest.raises(BadSource):
            tester.unpack(without, layer.shape, scheme)
        for wrong in (packed[suffix].to(torch.float64), torch.zeros(3, 1, dtype=packed[suffix].dtype)):
            with pytest.raises(BadSource):
                tester.unpack({**packed, suffix: wrong}, layer.shape, scheme)
    with pytest.raises(BadSource):
        tester.unpack(packed, (layer.shape[0], 2 * layer.shape[1]), scheme)


def test_columns_in_another_order_are_refused() -> None:
    scheme = Scheme(bits=4, group=32)
    packed = form("gptq").pack(numerics.round_to_nearest(weights(1, 8, 64, "normal"), scheme, torch.float16))
    packed["g_idx"] = packed["g_idx"].flip(0).contiguous()
    with pytest.raises(BadSource, match="desc_act"):
        form("gptq").unpack(packed, (8, 64), scheme)


def test_a_symmetric_layer_whose_zeros_are_not_in_the_middle_is_refused() -> None:
    layer = random_codes(1, 8, 64, Scheme(bits=4, group=32, symmetric=False), torch.float16)
    with pytest.raises(BadSource, match="zero points of a symmetric layer are not all 8"):
        form("gptq").unpack(form("gptq").pack(layer), (8, 64), Scheme(bits=4, group=32))


def test_double_quantization_stores_4_127_bits_a_weight() -> None:
    weight = weights(1, 512, 2048, "normal")
    layer = numerics.encode_blockwise(weight, "nf4", double_quant=True)
    packed = form("bnb4").pack(layer)
    sizes = {suffix: tensor.numel() * tensor.element_size() for suffix, tensor in packed.items()}
    a_weight = sum(sizes[part] for part in ("weight", "weight.absmax", "weight.nested_absmax"))
    assert round(a_weight * 8 / weight.numel(), 3) == 4.127
    assert sum(sizes.values()) - a_weight < 1400  # maps and the JSON, once a layer
    plain = form("bnb4").pack(numerics.encode_blockwise(weight, "nf4", double_quant=False))
    assert plain["weight.absmax"].numel() * 32 / weight.numel() == 0.5
