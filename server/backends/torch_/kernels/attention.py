"""Attention of one new token of each sequence over keys and values in pages: cuda/attention.cu."""

from functools import cache

import torch
from torch import Tensor

from server.backends.torch_.kernels import driver

PAGE = 16
THREADS = 128
LARGEST_HEAD = 256
MOST_SPLITS = 32
BLOCKS_PER_PROCESSOR = 4
PARTIAL_BYTES = 64 * 2**20
COUNTERS = 1 << 16
FILES = ("ptx", "attention")


def paged_decode(  # noqa: PLR0913, PLR0917  a layer's whole state
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [rows, heads, size] -> the same shape.

    keys, values [pages, 16, KV heads, size]; tables int32 [rows, pages]; lengths int32 [rows]: positions in
    the pages, the new token's own included, 0 for a row that is none (its result is zeros). A token sees the
    newest `window` positions. `softcap`: scores are cap * tanh(score / cap).
    """
    if not runs_on(q, keys):
        return reference(q, keys, values, tables, lengths, scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0]:
        kernels = driver.load(q.device, FILES, (("BF16", int(q.dtype == torch.bfloat16)),))
        cap = (window or 0, float(scale), float(softcap or 0.0))
        launch(kernels, (q.contiguous(), keys, values, tables, lengths, out), cap, _processors(q.device))
    return out


def runs_on(q: Tensor, keys: Tensor) -> bool:
    from server.backends.torch_.kernels.linear import HALVES, compiled

    if q.device.type != "cuda" or q.dtype not in HALVES or keys.dtype != q.dtype:
        return False
    size = q.shape[2]
    return size % 8 == 0 and size <= LARGEST_HEAD and keys.is_contiguous() and compiled(q.device)


def launch(
    kernels: driver.Module, tensors: tuple[Tensor, ...], rule: tuple[int, float, float], processors: int
) -> None:
    """`tensors`: q, keys, values, tables, lengths, out; `rule`: window or 0, scale, softcap or 0."""
    q, keys, _, tables, *_ = tensors
    rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    lanes = next(lanes for lanes in (8, 16, 32) if lanes * 8 >= size)
    largest_group = 4 if lanes == 32 else 8
    group = next(g for g in (1, 2, 4, 8) if g >= heads // kv_heads or g == largest_group)
    blocks = kv_heads * -(-(heads // kv_heads) // group)
    partial, counters = _workspace(q.device)
    wanted = -(-BLOCKS_PER_PROCESSOR * processors // (blocks * rows))
    room = PARTIAL_BYTES // (rows * blocks * group * (size + 2) * 4)
    splits = max(1, min(wanted, MOST_SPLITS, -(-tables.shape[1] // 2), room))
    sizes = (heads, kv_heads, size, tables.shape[1])
    kernels.launch(
        f"paged_{lanes}_{group}",
        (splits, blocks, rows),
        THREADS,
        (*tensors, partial, counters, *sizes, *rule),
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial results, and how many have arrived (zero between launches). For one stream at a time."""
    return (
        torch.empty(PARTIAL_BYTES // 4, dtype=torch.float32, device=device),
        torch.zeros(COUNTERS, dtype=torch.int32, device=device),
    )


def reference(  # noqa: PLR0913, PLR0917
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same with torch, in float32 (float64 for float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    k, v = (
        part[tables.long()].flatten(1, 2).to(wide) for part in (keys, values)
    )  # row, position, head, size
    grouped = q.to(wide).view(rows, kv_heads, heads // kv_heads, size)
    scores = torch.einsum("rhgs,rphs->rhgp", grouped, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(k.shape[1], device=q.device)
    seen = positions < lengths[:, None]
    if window is not None:
        seen &= positions >= lengths[:, None] - window
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("rhgp,rphs->rhgs", weights, v).reshape(q.shape).to(q.dtype)
