"""Chunks of prompts through the FlashAttention that torch brings for CUDA (arXiv:2307.08691)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.backends.torch_.kv import PAGE
from server.backends.torch_.transfer import to_device

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """Sequences one behind the other; made once for all layers of a pass."""

    places: Tensor  # int64: where each position's keys and values lie
    query_ends: Tensor  # int32 [chunks + 1]
    key_ends: Tensor  # int32 [chunks + 1]
    longest_query: int
    longest_key: int


def plan_flash(pages: Sequence[Tensor], queries: Sequence[int], keys: Sequence[int]) -> FlashPlan:
    """For chunks with the pages `pages`, so many new tokens and so many positions in all."""
    device = pages[0].device
    within = torch.arange(PAGE, device=device)
    places = [
        (held[:, None] * PAGE + within).flatten()[:size] for held, size in zip(pages, keys, strict=True)
    ]
    ends = torch.tensor([[0, *queries], [0, *keys]]).cumsum(1).to(torch.int32)
    ends = to_device(ends, device)
    return FlashPlan(torch.cat(places), ends[0], ends[1], max(queries), max(keys))


def runs_on(q: Tensor, softcap: float | None) -> bool:
    return q.is_cuda and q.dtype in HALVES and softcap is None and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def flash(
    q: Tensor, keys: Tensor, values: Tensor, plan: FlashPlan, scale: float, window: int | None
) -> Tensor:
    """q [tokens, heads, head] of all chunks. The last query of a chunk sees all its positions."""
    k, v = (pages.flatten(0, 1)[plan.places] for pages in (keys, values))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q.contiguous(),
        k,
        v,
        plan.query_ends,
        plan.key_ends,
        plan.longest_query,
        plan.longest_key,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return out
