"""What is done to rows between linear layers: norms, gates, rotary positions, rounding to int8.

Each call is one launch on CUDA.

On a CPU, and for float32, torch computes the same with the same roundings.
"""

import torch
from torch import Tensor
from torch.nn import functional

from server.backends.torch_.kernels import driver

THREADS = 256
FILES = ("ptx", "fused")
HALVES = (torch.float16, torch.bfloat16)
# Rounding to int8 is launched without overlap: measured on an H200, it took 4.1 us with it and 2.5 without.


def module(device: torch.device, dtype: torch.dtype) -> driver.Module:
    return driver.load(device, FILES, (("BF16", int(dtype == torch.bfloat16)),))


def runs_on(*tensors: Tensor, width: int = 8) -> bool:
    """Whether the kernels take these rows; their pieces are 8 numbers."""
    first = tensors[0]
    if first.device.type != "cuda" or width % 8 or any(item.dtype != first.dtype for item in tensors):
        return False
    from server.backends.torch_.kernels.linear import compiled

    return first.dtype in HALVES and compiled(first.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width], normed in float32, times `weight`, in the dtype of `weight`. x may be float32."""
    width = x.shape[-1]
    wide = x.dtype == torch.float32
    if not runs_on(weight, *(() if wide else (x,)), width=width):
        return _rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format)
    if rows := x.numel() // width:
        kernels = module(x.device, weight.dtype)
        name = "rms_norm_wide" if wide else "rms_norm"
        kernels.launch(name, (rows, 1, 1), THREADS, (x, weight, out, width, float(eps)))
    return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (weight * normed).to(weight.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, in the dtype of `weight`, and the sum: float32, as both are."""
    width = x.shape[-1]
    if not runs_on(weight, width=width):
        total = x + residual
        return _rms_norm(total, weight, eps), total
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(residual), torch.empty_like(x, dtype=weight.dtype)
    if rows := x.numel() // width:
        arguments = (x, residual, weight, total, out, width, float(eps))
        module(x.device, weight.dtype).launch("add_rms_norm", (rows, 1, 1), THREADS, arguments)
    return out, total


def silu_mul(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of float32 [..., gate | up], rounded to `dtype`."""
    inner = gate_up.shape[-1] // 2
    if not runs_on(gate_up.new_empty(0, dtype=dtype), width=inner):
        return (functional.silu(gate_up[..., :inner]) * gate_up[..., inner:]).to(dtype)
    gate_up = gate_up.contiguous()
    out = torch.empty(*gate_up.shape[:-1], inner, dtype=dtype, device=gate_up.device)
    if rows := out.numel() // inner:
        grid = (-(-inner // (8 * THREADS)), rows, 1)
        module(out.device, out.dtype).launch("silu_mul", grid, THREADS, (gate_up, out, inner))
    return out


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor, heads: int
) -> Tensor:
    """Queries [rows, heads, size] of qkv [rows, (heads + 2 KV heads) * size], turned; k, v go to their pages.

    qkv and cos, sin [rows, turned <= size], as in transformers, are float32; keys, values [pages, 16, KV
    heads, size] have the dtype of the result. places int64 [rows], counted in tokens from page 0's first,
    negative: nowhere.
    """
    kv_heads, size = keys.shape[2:]
    rows, turned = qkv.shape[0], cos.shape[-1]
    if not runs_on(keys, values):
        return _rope_and_store(qkv, cos, sin, keys, values, places, heads)
    q = torch.empty(rows, heads, size, dtype=keys.dtype, device=qkv.device)
    if rows:
        grid = (-(-(heads + 2 * kv_heads) // (THREADS // 32)), rows, 1)
        tensors = (qkv.contiguous(), cos.contiguous(), sin.contiguous(), places, q, keys, values)
        sizes = (heads, kv_heads, size, turned)
        module(q.device, q.dtype).launch("rope_and_store", grid, THREADS, (*tensors, *sizes))
    return q


def _rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor, heads: int
) -> Tensor:
    kv_heads, size = keys.shape[2:]
    q, k, v = qkv.view(len(qkv), -1, size).tensor_split([heads, heads + kv_heads], dim=1)
    live, dtype = places >= 0, keys.dtype
    keys.flatten(0, 1)[places[live]] = _turn(k, cos, sin).to(dtype)[live]
    values.flatten(0, 1)[places[live]] = v.to(dtype)[live]
    return _turn(q, cos, sin).to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    front, rest = x[..., :turned], x[..., turned:]
    first, second = front.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return torch.cat([front * cos[:, None] + rotated * sin[:, None], rest], dim=-1)


def round_rows(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8's activations [rows, width] as numbers: multiples of a row's absmax / 127, outliers unchanged.

    A row decides alone, so that its numbers do not depend on the batch.
    """
    if not runs_on(x):
        inside = x.abs() < threshold
        step = (x.float().abs() * inside).amax(-1, keepdim=True) / 127.0
        rounded = (x.float() / step.clamp_min(torch.finfo(torch.float32).tiny)).round() * step
        return torch.where(inside, rounded.to(x.dtype), x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if rows := x.shape[0]:
        arguments = (x, out, x.shape[1], float(threshold))
        module(x.device, x.dtype).launch("round_rows", (rows, 1, 1), THREADS, arguments, overlap=False)
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their float32 scales [rows]: x = codes * scale."""
    if not runs_on(x):
        scales = x.float().abs().amax(-1) / 127.0
        steps = scales.clamp_min(torch.finfo(torch.float32).tiny)
        return (x.float() / steps[:, None]).round().to(torch.int8), scales
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if rows := x.shape[0]:
        arguments = (x, codes, scales, x.shape[1])
        module(x.device, x.dtype).launch("quantize_rows", (rows, 1, 1), THREADS, arguments, overlap=False)
    return codes, scales


def scale_sums(
    sums: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    wide: bool = False,
) -> Tensor:
    """int32 [rows, columns] times both scales, plus bias of `dtype`: in `dtype`, or float32 if `wide`."""
    target = torch.float32 if wide else dtype
    if not runs_on(torch.empty(0, dtype=dtype, device=sums.device)):
        scaled = (sums.float() * (row_scales[:, None] * column_scales)).to(target)
        return scaled if bias is None else scaled + bias
    out = torch.empty(sums.shape, dtype=target, device=sums.device)
    if sums.numel():
        grid = (-(-sums.shape[1] // THREADS), sums.shape[0], 1)
        arguments = (sums, row_scales, column_scales, bias, out, sums.shape[1], int(wide))
        module(out.device, dtype).launch("scale_sums", grid, THREADS, arguments)
    return out
