"""Every kernel against float64 on random shapes: fresh inputs, outputs full of NaN before, TF32 off."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu import layers
from quant.layer import QuantizedLinear
from quant.scheme import Scheme
from server.backends.torch_.kernels import activations, attention, direct, linear, w8a8
from server.backends.torch_.kernels.packed import Packed, pack

T = TypeVar("T")

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class Checked:
    name: str
    error: float
    limit: float

    @property
    def fine(self) -> bool:
        return self.error < self.limit  # also false for NaN


def error(got: Tensor, want: Tensor) -> float:
    norm = want.double().norm().clamp_min(1e-30)
    return float((got.double() - want.double()).norm() / norm)


Size = tuple[tuple[int, ...], torch.dtype]


def poisoned(call: Callable[[], T], *sizes: Size) -> T:
    """The call's result; memory of such sizes held NaN just before, so that what is not written shows."""
    blocks = [torch.full(shape, float("nan"), dtype=dtype, device="cuda") for shape, dtype in sizes]
    del blocks
    return call()


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


KINDS = ("int4", "nf4", "int8 weights", "llm.int8", "w8a8")


def linears(count: int, kinds: Sequence[str] = ("int4", *KINDS)) -> Iterator[Checked]:
    device = torch.device("cuda")
    for index in range(count):
        dtype = random.choice(list(LIMITS))
        rows, columns = random.randint(1, 320) * 16, random.randint(1, 80) * 64
        batch = random.choice([1, random.randint(1, 16), random.randint(1, 64), random.randint(1, 300)])
        kind = kinds[index % len(kinds)]
        layer = _layer(kind, (rows, columns), dtype, device)
        x = torch.randn(batch, columns, device=device).to(dtype)
        if kind == "llm.int8":
            x[:, random.randrange(columns)] *= 12
        bias = torch.randn(rows, device=device).to(dtype) if random.random() < 0.5 else None
        name = f"{kind} {rows}x{columns} batch {batch} {_short(dtype)} {_groups(layer)}"
        yield from _one(name, kind, layer, x, bias)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _groups(layer: QuantizedLinear) -> str:
    scheme = getattr(layer, "scheme", None)
    return "" if scheme is None else f"group {scheme.group} {'sym' if scheme.symmetric else 'asym'}"


def _layer(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
    if kind == "nf4":
        return layers.nf4(shape, 64, device)
    if kind == "llm.int8":
        return layers.int8(shape, device)
    if kind == "w8a8":
        return layers.affine(shape, Scheme(bits=8, group=None), dtype, device)
    groups = [group for group in (32, 64, 128, None) if group is None or shape[1] % group == 0]
    bits = 4 if kind == "int4" else 8
    scheme = Scheme(bits=bits, group=random.choice(groups), symmetric=random.random() < 0.5)
    return layers.affine(shape, scheme, dtype, device)


def _one(name: str, kind: str, layer: QuantizedLinear, x: Tensor, bias: Tensor | None) -> Iterator[Checked]:
    out = (((x.shape[0], layer.shape[0]), x.dtype),)
    weight = layer.dequantize().double()
    added = 0.0 if bias is None else bias.double()
    if kind == "w8a8":
        signed = w8a8.sign(layer)
        got = poisoned(lambda: w8a8.linear(x, signed, bias), *out)
        codes, scales = activations.quantize_rows(x.float())  # float32: torch's own arithmetic
        yield Checked(
            name, error(got, (codes.double() * scales.double()[:, None]) @ weight.T + added), LIMITS[x.dtype]
        )
        return
    packed = pack(layer, x.dtype)
    seen = activations.round_rows(x.float(), packed.threshold).double() if packed.threshold else x.double()
    want = seen @ weight.T + added
    got = poisoned(lambda: linear.linear(x, packed, bias), *out)
    yield Checked(name, error(got, want), LIMITS[x.dtype])
    if packed.threshold is None:
        yield from _other_ways(name, packed, x, bias, want)


def _other_ways(name: str, packed: Packed, x: Tensor, bias: Tensor | None, want: Tensor) -> Iterator[Checked]:
    out = (((x.shape[0], packed.shape[0]), x.dtype),)
    limit = LIMITS[x.dtype]
    wide = (((x.shape[0], packed.shape[0]), torch.float32),)
    dense = ((packed.shape, x.dtype),)
    for way, label, rounding in ((linear.small, "kernel", 0.0), (linear.large, "dequantized", limit)):
        got = poisoned(lambda: way(x, packed, bias, False), *dense, *out)
        yield Checked(f"{name} ({label})", error(got, want), limit)
        got = poisoned(lambda: way(x, packed, bias, True), *dense, *wide)
        yield Checked(f"{name} ({label}, float32)", error(got, want), rounding or _wide_limit(packed, x))
    yield from _direct(name, packed, x, bias, want)


def _direct(name: str, packed: Packed, x: Tensor, bias: Tensor | None, want: Tensor) -> Iterator[Checked]:
    """Each cut of the kernel for a few rows."""
    if len(x) > direct.MOST_ROWS:
        return
    kernels = direct.module(packed, x)
    for cut in direct.CUTS:
        if len(x) <= 8 * cut.tiles:
            y = torch.full(want.shape, float("nan"), dtype=torch.float32, device=x.device)
            direct.launch(kernels, x, packed, bias, y, cut)
            yield Checked(f"{name} ({cut})", error(y, want), _wide_limit(packed, x))


def _wide_limit(packed: Packed, x: Tensor) -> float:
    """Of float32 results: scales have 16 bits and sums another order; NF4's values are rounded, too."""
    if packed.book is None:
        return 1e-4
    return 1e-4 if x.dtype == torch.float16 else 1e-3


def triton_linears(count: int) -> Iterator[Checked]:
    from server.backends.torch_.kernels import triton_linear

    device = torch.device("cuda")
    for index in range(count):
        dtype = list(LIMITS)[index % 2]
        shape = (random.randint(1, 40) * 16, random.randint(1, 20) * 64)
        kind = ("int4", "nf4", "int8 weights")[index % 3]
        layer = _layer(kind, shape, dtype, device)
        x = torch.randn(random.randint(1, 100), shape[1], device=device).to(dtype)
        bias = torch.randn(shape[0], device=device).to(dtype)
        packed = pack(layer, dtype)
        got = poisoned(lambda: triton_linear.linear(x, packed, bias), ((x.shape[0], shape[0]), dtype))
        want = x.double() @ layer.dequantize().double().T + bias.double()
        yield Checked(
            f"triton {kind} {shape} {_short(dtype)} {_groups(layer)}", error(got, want), LIMITS[dtype]
        )


def attentions(count: int) -> Iterator[Checked]:
    device = torch.device("cuda")
    for _ in range(count):
        dtype = random.choice(list(LIMITS))
        size, kv_heads = random.choice([64, 80, 96, 128, 256]), random.choice([1, 2, 4, 8, 32])
        heads, rows, width = (
            kv_heads * random.choice([1, 2, 3, 4, 7, 8]),
            random.randint(1, 64),
            random.randint(1, 80),
        )
        q = torch.randn(rows, heads, size, device=device).to(dtype)
        keys, values = (torch.randn(512, 16, kv_heads, size, device=device).to(dtype) for _ in range(2))
        tables = torch.randint(0, 512, (rows, width), dtype=torch.int32, device=device)
        lengths = torch.randint(0, width * 16 + 1, (rows,), dtype=torch.int32, device=device)
        lengths[0] = width * 16
        window, cap = random.choice([None, 7, 100, 1000]), random.choice([None, None, 30.0])
        rule = (size**-0.5, window, cap)
        got = poisoned(
            lambda: attention.paged_decode(q, keys, values, tables, lengths, *rule),
            (tuple(q.shape), dtype),
        )
        want = attention.reference(q.double(), keys.double(), values.double(), tables, lengths, *rule)
        shape = f"{rows}x{heads}/{kv_heads}x{size} {width * 16}"
        name = f"attention {shape} {_short(dtype)} window {window} cap {cap}"
        yield Checked(name, error(got, want), LIMITS[dtype])


def others(count: int) -> Iterator[Checked]:
    """Norms, gates and rotary positions."""
    device = torch.device("cuda")
    for _ in range(count):
        dtype = random.choice(list(LIMITS))
        rows, width = random.randint(1, 300), random.randint(1, 1024) * 8
        x, residual, weight = (
            torch.randn(*shape, device=device).to(dtype) for shape in ((rows, width), (rows, width), (width,))
        )
        stream, limit, area = torch.randn(rows, width, device=device), LIMITS[dtype], ((rows, width), dtype)
        wide = ((rows, width), torch.float32)
        normed, total = poisoned(
            lambda: activations.add_rms_norm(x.float(), stream, weight, 1e-5), area, wide
        )
        exact = x.double() + stream.double()
        want = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        yield Checked(f"add_rms_norm {rows}x{width}", error(normed, want), limit)
        yield Checked(f"sum {rows}x{width}", error(total, exact), 1e-6)
        got = poisoned(lambda: activations.rms_norm(total, weight, 1e-5), area)
        yield Checked(f"rms_norm of float32 {rows}x{width}", error(got, normed), 1e-9)
        got = poisoned(lambda: activations.rms_norm(x, weight, 1e-5), area)
        want = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        yield Checked(f"rms_norm {rows}x{width}", error(got, want), limit)
        pair = torch.cat([x, residual], dim=-1).float()
        got = poisoned(lambda: activations.silu_mul(pair, dtype), area)
        want = torch.nn.functional.silu(x.double()) * residual.double()
        yield Checked(f"silu_mul {rows}x{width}", error(got, want), limit)
        yield _rope(dtype, device)


def _rope(dtype: torch.dtype, device: torch.device) -> Checked:
    rows, heads, kv_heads, size = (
        random.randint(1, 200),
        8,
        random.choice([1, 2, 8]),
        random.choice([64, 80, 128]),
    )
    turned = random.choice([size, size // 2])
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size, device=device)
    cos, sin = (torch.randn(rows, turned, device=device) for _ in range(2))
    places = torch.randperm(40 * 16, device=device)[:rows]
    places[0] = -1
    caches = [torch.zeros(40, 16, kv_heads, size, dtype=dtype, device=device) for _ in range(4)]
    q = activations.rope_and_store(qkv, cos, sin, caches[0], caches[1], places, heads)
    want = activations._rope_and_store(qkv, cos, sin, caches[2], caches[3], places, heads)
    errors = [error(a, b) for a, b in ((q, want), (caches[0], caches[2]), (caches[1], caches[3]))]
    return Checked(f"rope_and_store {rows}x{heads}/{kv_heads}x{size}", max(errors), 1e-3)


def graphs() -> Iterator[Checked]:
    """A captured step, replayed with new inputs, gives the bits of an eager one."""
    device, dtype = torch.device("cuda"), torch.float16
    for batch in (1, 3, 8, 16, 33, 100):
        packed = pack(layers.affine((4096, 4096), Scheme(bits=4, symmetric=False), dtype, device))
        x = torch.randn(batch, 4096, device=device).to(dtype)
        tables = torch.randint(0, 512, (batch, 64), dtype=torch.int32, device=device)
        lengths = torch.full((batch,), 5, dtype=torch.int32, device=device)
        keys, values = (torch.randn(512, 16, 8, 128, device=device).to(dtype) for _ in range(2))

        def step() -> Tensor:
            q = linear.linear(x, packed).view(batch, 32, 128)
            return attention.paged_decode(q, keys, values, tables, lengths, 0.1)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.randint(1, 1025, (batch,)))
        captured.fill_(float("nan"))
        graph.replay()
        yield Checked(f"graph, batch {batch}", error(captured, step()), 1e-12)
