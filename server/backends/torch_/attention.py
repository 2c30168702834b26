"""Attention over paged KV memory, as transformers' models call it.

Registered in transformers' table of attention functions: modeling code computes queries, keys and values of
one flattened batch, hands them here and knows nothing of sequences. Who may see whom is in `Layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from server.backends.torch_.flash import FlashPlan, flash, plan_flash, runs_on
from server.backends.torch_.kernels.attention import paged_decode
from server.backends.torch_.kv import PAGE, KVCache

NAME = "quantserve_paged"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive new tokens of one sequence: `begin` to `end` of the pass, from position `start` on."""

    begin: int
    end: int
    start: int
    pages: Tensor  # int64 [pages] that hold positions 0 to start + end - begin


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a pass belong. First one token of each of some sequences, then chunks."""

    places: Tensor  # int64 [tokens]: where each token's keys and values go, counted from page 0's first
    tables: Tensor  # int32 [single tokens, pages]
    lengths: Tensor  # int32 [single tokens]: positions to attend to, the token's own included
    chunks: Sequence[Chunk] = ()


@dataclass(slots=True)
class Paged:
    """What one pass gives its attention layers. `calls` tells whether all of them came here."""

    cache: KVCache
    layout: Layout
    calls: int = 0
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    flash: FlashPlan | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer attends."""

    scale: float
    window: int | None  # positions that a token sees, its own included
    softcap: float | None


class Unsupported(Exception):
    """The architecture attends in a way that is not built. One line for a user."""


def paged_attention(  # noqa: PLR0913, PLR0917  transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Paged | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, head], key, value [1, KV heads, tokens, head] -> [1, tokens, heads, head]."""
    if paged is None or attention_mask is not None or s_aux is not None:
        raise Unsupported("its attention needs a mask or sinks of its own")
    layer = getattr(module, "layer_idx", paged.calls)
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    if key.shape[1::2] != keys.shape[2:] or value.shape[1::2] != values.shape[2:]:
        raise Unsupported("its layers differ in the shape of their keys or values")
    paged.calls += 1
    rule = Rule(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    paged.cache.write(layer, paged.layout.places, k, v)
    return attend(q, keys, values, paged, rule)[None], None


def attend(q: Tensor, keys: Tensor, values: Tensor, paged: Paged, rule: Rule) -> Tensor:
    """q [tokens, heads, head] against pages -> [tokens, heads, head]."""
    layout, singles = paged.layout, len(paged.layout.lengths)
    if singles == len(q):
        return decode(q, keys, values, layout, rule)
    out = torch.empty_like(q)
    if singles:
        out[:singles] = decode(q[:singles], keys, values, layout, rule)
    if runs_on(q, rule.softcap):
        paged.flash = paged.flash or _plan(layout.chunks)
        out[singles:] = flash(q[singles:], keys, values, paged.flash, rule.scale, rule.window)
        return out
    for chunk in layout.chunks:
        mask = _chunk_mask(paged, chunk, rule.window)
        out[chunk.begin : chunk.end] = prefill(q[chunk.begin : chunk.end], keys, values, chunk, mask, rule)
    return out


def _plan(chunks: Sequence[Chunk]) -> FlashPlan:
    sizes = [chunk.end - chunk.begin for chunk in chunks]
    positions = [chunk.start + size for chunk, size in zip(chunks, sizes, strict=True)]
    return plan_flash([chunk.pages for chunk in chunks], sizes, positions)


def decode(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """One token of each sequence: q [sequences, heads, head].

    The query heads that share a KV head are treated as so many queries of it, so that nothing is repeated.
    """
    if q.is_cuda:
        tables, lengths = layout.tables, layout.lengths
        return paged_decode(q, keys, values, tables, lengths, rule.scale, rule.window, rule.softcap)
    count, heads, head = q.shape
    kv_heads = keys.shape[2]
    k, v = (_gather(pages, layout.tables) for pages in (keys, values))
    positions = torch.arange(k.shape[2], device=q.device)
    seen = positions < layout.lengths[:, None]
    if rule.window is not None:
        seen &= positions >= layout.lengths[:, None] - rule.window
    grouped = q.reshape(count, kv_heads, heads // kv_heads, head)
    return _attention(grouped, k, v, seen[:, None, None, :], rule).reshape(count, heads, head)


def prefill(q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, mask: Tensor, rule: Rule) -> Tensor:
    """One chunk: q [tokens, heads, head], mask [tokens, positions]."""
    count, heads, head = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    k, v = (_gather(pages, chunk.pages[None]) for pages in (keys, values))
    grouped = (
        q.view(count, kv_heads, group, head).permute(1, 2, 0, 3).reshape(1, kv_heads, group * count, head)
    )
    out = _attention(grouped, k, v, mask.repeat(group, 1), rule)
    return out.view(kv_heads, group, count, head).permute(2, 0, 1, 3).reshape(count, heads, head)


def _gather(pages: Tensor, tables: Tensor) -> Tensor:
    """[sequences, KV heads, positions, head] of the pages that the tables [sequences, pages] name."""
    return pages[tables].flatten(1, 2).transpose(1, 2)


def _chunk_mask(paged: Paged, chunk: Chunk, window: int | None) -> Tensor:
    """Who sees whom, [tokens, positions]; made once for all layers of a pass."""
    found = paged.masks.get((chunk.begin, window))
    if found is None:
        device = chunk.pages.device
        rows = torch.arange(chunk.start, chunk.start + chunk.end - chunk.begin, device=device)[:, None]
        positions = torch.arange(len(chunk.pages) * PAGE, device=device)
        found = positions <= rows
        if window is not None:
            found &= positions > rows - window
        paged.masks[chunk.begin, window] = found
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [batch, KV heads, queries, head], k, v [batch, KV heads, positions, head], mask: who is seen."""
    if rule.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = (q @ k.transpose(-1, -2)).float() * rule.scale
    scores = torch.tanh(scores / rule.softcap) * rule.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v
