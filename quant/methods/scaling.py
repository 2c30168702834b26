"""Rescaling channels between a norm or linear and the linears that read it, without changing the model.

x / s is folded into the source's weights and W * s into the linears', so that a file and its readers know
nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.families import ScaleGroup
from quant.methods.base import Block, LayerPlan


@dataclass(frozen=True, slots=True)
class Channels:
    """How the source's channels come in the linears' inputs: [heads, repeats, size of a head]."""

    heads: int
    repeats: int  # query heads that share a kv head; 1 where every channel comes once
    size: int

    def reduce(self, statistic: Tensor) -> Tensor:
        """Mean over the columns that one channel of the source feeds: [inputs] -> [channels]."""
        return statistic.view(self.heads, self.repeats, self.size).mean(1).flatten()

    def widest(self, statistic: Tensor) -> Tensor:
        """The same with the maximum."""
        return statistic.view(self.heads, self.repeats, self.size).amax(1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """[channels] -> [inputs]"""
        by_head = scales.view(self.heads, 1, self.size)
        return by_head.expand(self.heads, self.repeats, self.size).flatten()


def channels_of(block: Block, group: ScaleGroup, plans: Mapping[str, LayerPlan]) -> Channels | None:
    """None where the group cannot be rescaled: a linear keeps its weights, or the source has a bias, which
    would have to be rounded anew."""
    source = block.module.get_submodule(group.source)
    wanted = {*group.linears, *([group.source] if isinstance(source, nn.Linear) else [])}
    if not wanted <= plans.keys() or getattr(source, "bias", None) is not None:
        return None
    inputs = block.linears[group.linears[0]].weight.shape[1]
    if not group.per_head:
        return Channels(1, 1, inputs)
    channels = block.linears[group.source].weight.shape[0]
    size = int(block.module.get_submodule(group.per_head).head_dim)  # type: ignore[arg-type]
    return Channels(channels // size, inputs // channels, size)


def folded_norm(weight: Tensor, scales: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(weight / scales rounded so that the file can store it, the scales that this makes exactly). Norms that
    add `offset` to their weight are divided with it.

    What a float32 block holds may have come from, and go back to, 16 bits: the narrowest type that holds the
    weight as it is will hold the folded one too. Channels that would vanish or overflow keep their scale.
    """
    dtypes = (torch.bfloat16, torch.float16, weight.dtype)
    dtype = next(dtype for dtype in dtypes if torch.equal(weight.to(dtype).to(weight.dtype), weight))
    whole = weight.float() + offset
    folded = (whole / scales - offset).to(dtype).float()
    usable = (folded + offset != 0) & torch.isfinite(folded)
    folded = torch.where(usable, folded, weight.float())
    return folded.to(weight.dtype), torch.where(usable, whole / (folded + offset), 1.0)
