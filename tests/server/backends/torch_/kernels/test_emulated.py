"""The CUDA source itself, run on the CPU by an emulator, against float64.

What a GPU adds, the hardware's own behaviour and speed, is in benchmarks/gpu.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
import torch

from quant.layer import QuantizedLinear
from server.backends.torch_.kernels import activations, attention, direct, linear, w8a8
from server.backends.torch_.kernels.packed import Packed, pack
from tests.server.backends.torch_.kernels import emulator
from tests.server.backends.torch_.kernels.test_layout import affine, nf4

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
WIDE_LIMIT = 2e-5  # of float32: left are the 16 bits of scales, and the order of sums


class Builder(Protocol):
    def __call__(self, names: Sequence[str], defines: Mapping[str, int]) -> emulator.EmulatedModule: ...


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    folder: Path = tmp_path_factory.mktemp("emulated")
    return lambda names, defines: emulator.build(folder, names, defines)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


LINEARS: list[tuple[QuantizedLinear, torch.dtype, Sequence[tuple[int, tuple[int, int, int, int]]]]] = [
    # (batch, (tiles, row warps, height, splits))
    (
        affine(4, 128, False, (80, 1088)),
        torch.float16,
        [(1, (1, 1, 1, 1)), (3, (1, 2, 1, 2)), (9, (2, 4, 1, 1)), (30, (4, 4, 2, 2)), (70, (8, 8, 1, 1))],
    ),
    (
        affine(4, 32, True, (33, 96)),
        torch.bfloat16,
        [(2, (1, 4, 1, 1)), (17, (4, 8, 1, 1)), (150, (8, 8, 2, 1))],
    ),
    (nf4((40, 320), nested=False), torch.float16, [(5, (1, 2, 1, 1)), (12, (2, 2, 1, 2))]),
    (affine(8, None, True, (33, 640)), torch.bfloat16, [(4, (1, 2, 1, 1)), (40, (8, 4, 2, 2))]),
    (affine(8, 64, False, (16, 192)), torch.float16, [(1, (1, 1, 1, 1)), (32, (4, 4, 1, 1))]),
]


@pytest.mark.parametrize(("layer", "dtype", "runs"), LINEARS)
def test_linear_layers(
    build: Builder,
    layer: QuantizedLinear,
    dtype: torch.dtype,
    runs: Sequence[tuple[int, tuple[int, int, int, int]]],
) -> None:
    packed = pack(layer)
    kernels = build(linear.FILES[1:], direct.defines(packed, dtype))
    rows, columns = packed.shape
    weight, bias = layer.dequantize().double(), torch.randn(rows).to(dtype)
    for batch, cut in runs:
        x = torch.randn(batch, columns).to(dtype)
        want = x.double() @ weight.T + bias.double()
        for kind, limit in ((dtype, LIMITS[dtype]), (torch.float32, WIDE_LIMIT)):
            y = torch.full((batch, rows), float("nan"), dtype=kind)
            linear.launch(kernels, x, packed, bias, y, linear.Plan(*cut))
            assert error(y, want) < limit
            assert not linear.workspace(x.device)[1].any(), "counters are left as they were found"
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    linear.launch_dequantize(kernels, packed, out)
    assert error(out, weight) < LIMITS[dtype]


DIRECT = [
    (affine(4, 128, False, (80, 1088)), torch.float16),
    (affine(4, 32, True, (33, 96)), torch.bfloat16),
    (nf4((40, 320), nested=False), torch.float16),
    (affine(8, None, True, (33, 640)), torch.bfloat16),
    (affine(8, 64, False, (16, 200)), torch.float16),
]


@pytest.mark.parametrize(("layer", "dtype"), DIRECT)
def test_linear_layers_of_a_few_rows(build: Builder, layer: QuantizedLinear, dtype: torch.dtype) -> None:
    packed = pack(layer)
    kernels = build(direct.FILES[1:], direct.defines(packed, dtype))
    rows, columns = packed.shape
    weight, bias = layer.dequantize().double(), torch.randn(rows).to(dtype)
    for cut in direct.CUTS:
        batch = random.randint(1, 8 * cut.tiles)
        x = torch.randn(batch, columns).to(dtype)
        for kind, limit in ((dtype, LIMITS[dtype]), (torch.float32, WIDE_LIMIT)):
            y = torch.full((batch, rows), float("nan"), dtype=kind)
            direct.launch(kernels, x, packed, bias, y, cut)
            assert error(y, x.double() @ weight.T + bias.double()) < limit


ATTENTIONS = [
    # head size, KV heads, queries of each, pages of a row, window, softcap
    (64, 2, 1, 9, None, None),
    (128, 1, 8, 20, 40, None),
    (80, 3, 3, 3, None, 30.0),
    (256, 1, 12, 9, 5, 30.0),
]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("size", "kv_heads", "ratio", "width", "window", "cap"), ATTENTIONS)
def test_attention(  # noqa: PLR0913, PLR0917
    build: Builder,
    size: int,
    kv_heads: int,
    ratio: int,
    width: int,
    window: int | None,
    cap: float | None,
    dtype: torch.dtype,
) -> None:
    kernels = build(attention.FILES[1:], {"BF16": int(dtype == torch.bfloat16)})
    lengths = torch.tensor([0, 1, width * 16, width * 8 + 3], dtype=torch.int32)
    tables = (1 + torch.randperm(4 * width)).view(4, width).int()
    q = torch.randn(4, kv_heads * ratio, size).to(dtype)
    keys, values = (torch.randn(1 + 4 * width, 16, kv_heads, size).to(dtype) for _ in range(2))
    for processors in (1, 40):
        out = torch.full_like(q, float("nan"))
        rule = (window or 0, size**-0.5, cap or 0.0)
        attention.launch(kernels, (q, keys, values, tables, lengths, out), rule, processors)
        want = attention.reference(
            q.double(), keys.double(), values.double(), tables, lengths, rule[1], window, cap
        )
        assert error(out, want) < LIMITS[dtype]
        assert not out[0].any(), "a row without tokens is zeros"


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_rows_between_layers(build: Builder, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels give torch's numbers, bit for bit but for the last one where functions differ."""
    kernels = build(activations.FILES[1:], {"BF16": int(dtype == torch.bfloat16)})
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, 520), (3, 520), (520,)))
    x[0, 3], x[2] = 9, 0
    cos, sin, qkv = (torch.randn(3, width) for width in (32, 32, 10 * 64))

    def everything() -> list[torch.Tensor]:
        keys, values = torch.zeros(2, 3, 16, 2, 64, dtype=dtype)
        q = activations.rope_and_store(qkv, cos, sin, keys, values, torch.tensor([3, -1, 40]), 6)
        sums = torch.arange(600, dtype=torch.int32).view(3, 200) * 1000
        scales = (torch.ones(3), torch.full((200,), 1e-3), weight[:200], dtype)
        scaled = [activations.scale_sums(sums, *scales, wide=wide) for wide in (False, True)]
        return [
            activations.rms_norm(x, weight, 1e-5),
            activations.rms_norm(residual.float(), weight, 1e-5),
            *activations.add_rms_norm(x.float(), residual.float(), weight, 1e-5),
            activations.silu_mul(torch.cat([x, residual], dim=-1).float(), dtype),
            activations.round_rows(x, 6.0),
            *activations.quantize_rows(x),
            *(q, keys, values, *scaled),
        ]

    want = everything()
    monkeypatch.setattr(activations, "module", lambda device, dtype: kernels)
    monkeypatch.setattr(activations, "runs_on", lambda *tensors, width=8: True)
    for got, expected in zip(everything(), want, strict=True):
        off = (got.double() - expected.double()).abs()
        near_ties = got.dtype == torch.int8 and off.max() <= 1 and off.mean() < 0.01
        assert near_ties or error(got, expected.double()) < LIMITS[dtype]


@pytest.mark.parametrize("device", [linear.Device(132, 227 * 1024), linear.Device(40, 99 * 1024)])
@pytest.mark.parametrize("batch", [1, 9, 33, 256])
def test_plans_cover_the_product_and_fit(device: linear.Device, batch: int) -> None:
    for shape in ((16, 64), (4096, 11008), (22016, 4096)):
        packed = Packed(shape, 8, torch.empty(-(-shape[0] // 16), shape[1] // 64, 0), torch.empty(0, 1), 1, 0)
        chosen = linear.plan(packed, batch, device)
        blocks, _, layers = chosen.grid(shape[0], batch)
        assert blocks * chosen.rows >= shape[0]
        assert layers * chosen.tiles * 8 >= batch
        assert chosen.splits == 1 or chosen.partial_bytes(shape[0], batch) <= linear.PARTIAL_BYTES
        assert chosen.shared_bytes(8, 1) <= device.shared_bytes


def test_int8_products_are_exact() -> None:
    layer = affine(8, None, True, (48, 2048))
    signed, x = w8a8.sign(layer), torch.randn(2, 3, 2048)
    codes, scales = activations.quantize_rows(x.view(6, -1))
    want = (codes.double() * scales.double()[:, None]) @ layer.dequantize().double().T
    assert error(w8a8.linear(x, signed).view(6, -1), want) < 1e-6


def test_int8_products_without_int8_instructions_are_exact() -> None:
    """The largest sums there are, and sums of odd lengths; by float32 pieces, and as this CPU does it."""
    for rows, columns, out in ((1, 4100, 7), (5, 1024, 64), (300, 172, 33), (0, 64, 16)):
        left = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        right = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
        right[0] = -128
        left[:1] = 127
        want = torch.from_numpy(left.long().numpy() @ right.long().numpy().T).int()
        assert torch.equal(w8a8.by_pieces(left, right), want)
        assert torch.equal(w8a8.multiply(left, right), want)


def test_outliers_are_added_without_rounding() -> None:
    """Their order, and so the rows beside them, would show in the last bits."""
    layer = affine(8, None, True, (48, 512))
    signed, bias, x = w8a8.sign(layer), torch.randn(48), torch.randn(40, 512) * 4
    found = w8a8.linear(x, signed, bias, 6.0)
    for row in range(len(x)):
        assert torch.equal(w8a8.linear(x[row : row + 1], signed, bias, 6.0), found[row : row + 1])
    whole = w8a8.linear(x, signed, bias)
    near = torch.nn.functional.linear(x.double(), layer.dequantize().double(), bias.double())
    assert error(found, near) < error(whole, near) / 2


def test_rows_round_alone() -> None:
    """An outlier in one row changes no other row, and stays what it was."""
    x = torch.randn(4, 64)
    before = activations.round_rows(x, 6.0)
    x[1, 7] = 40.0
    after = activations.round_rows(x, 6.0)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert after[1, 7] == 40.0


@pytest.mark.parametrize("piece", [1, 128 * 32, linear.PIECE])
def test_the_cpu_computes_what_the_kernels_do(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many weights it unpacks at a time."""
    monkeypatch.setattr(linear, "PIECE", piece)
    layer = affine(4, 64, False, (56, 128))
    x, bias = torch.randn(2, 5, 128), torch.randn(56)
    got = linear.linear(x, pack(layer), bias)
    torch.testing.assert_close(got, x @ layer.dequantize().T + bias, rtol=1e-4, atol=1e-4)
