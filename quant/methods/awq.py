"""AWQ: channels that large activations meet are made larger before rounding, and smaller in the layer before.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization for
LLM Compression and Acceleration", MLSys 2024. Scales are x^r / w^(1-r), x a channel's mean activation, w
its mean weight relative to the largest of its group, r on a grid; then ranges are clipped, those of q and k
excepted. Scales and clips are kept only where the block's output error falls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quant.families import ScaleGroup
from quant.layer import AffineLinear
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import affine_scheme, install
from quant.methods.ranges import clipped_parameters
from quant.methods.rehearsal import Rehearsal
from quant.methods.scaling import Channels
from quant.methods.search import Candidates, balanced, search_scales
from quant.numerics import encode, grouped

TOKENS = 2048  # of the calibration text that searches look at
RATIOS = 20


class AWQMethod:
    name = "awq"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: `tokens` (looked at by the search), `ratios` (steps of the grid), `clip` (0: off)."""
        assert inputs is not None
        with Rehearsal(block, inputs, plans, int(options.get("tokens", TOKENS))) as rehearsal:
            plain = {name: rehearsal.layer_error(name, layer) for name, layer in rehearsal.layers.items()}
            changed = search_scales(rehearsal, channel_scales(int(options.get("ratios", RATIOS))))
            if options.get("clip", 1.0):
                changed |= search_clips(rehearsal)
            records = tuple(_record(rehearsal, name, plain[name], name in changed) for name in plans)
            layers = dict(rehearsal.layers)
        install(block, layers)
        for record in records:
            report(record)
        return BlockResult(layers=layers, records=records)


def _record(rehearsal: Rehearsal, name: str, rtn_loss: float, changed: bool) -> LayerRecord:
    return LayerRecord(
        module=f"{rehearsal.block.name}.{name}",
        method="awq" if changed else "rtn",
        loss=rehearsal.layer_error(name, rehearsal.layers[name]),
        rtn_loss=rtn_loss,
        fallback=None if changed else "no scale and no clip lowered the block's output error",
    )


def channel_scales(ratios: int) -> Candidates:
    """x^r / w^(1-r) and x^r for r from 0 up in so many steps."""

    def candidates(rehearsal: Rehearsal, group: ScaleGroup, channels: Channels) -> Iterator[Tensor]:
        activation = channels.reduce(rehearsal.seen[group.linears[0]].mean)
        weight = channels.reduce(relative_magnitudes(rehearsal, group.linears))
        for step in range(ratios):
            ratio = step / ratios
            yield balanced(activation.pow(ratio) / (weight.pow(1.0 - ratio) + 1e-4))
            if step:
                yield balanced(activation.pow(ratio))

    return candidates


def relative_magnitudes(rehearsal: Rehearsal, names: Sequence[str]) -> Tensor:
    """Mean over the rows of |w| / the largest |w| of its scale's group, [in]."""
    return torch.cat([_relative_magnitude(rehearsal, name) for name in names]).mean(0)


def _relative_magnitude(rehearsal: Rehearsal, name: str) -> Tensor:
    weight = rehearsal.masters[name]
    scheme = affine_scheme(rehearsal.block, name, rehearsal.plans[name])
    blocks = grouped(weight.abs(), scheme)
    relative = blocks / (blocks.amax(2, keepdim=True) + 1e-6)
    return relative.flatten(1)[:, : weight.shape[1]]


def search_clips(rehearsal: Rehearsal) -> set[str]:
    """Clips linear after linear; those that were."""
    best, changed = rehearsal.block_error(), set[str]()
    for name, plan in rehearsal.plans.items():
        if name in rehearsal.block.family.unclipped:
            continue
        scheme, weight = affine_scheme(rehearsal.block, name, plan), rehearsal.masters[name]
        scales, zeros = clipped_parameters(weight, rehearsal.gram(name), scheme, plan.scale_dtype)
        layer = AffineLinear(scheme, encode(weight, scales, zeros, scheme), scales, zeros)
        error = rehearsal.block_error({**rehearsal.layers, name: layer})
        if error < best:
            best, changed = error, changed | {name}
            rehearsal.layers[name] = layer
    return changed


AWQ = AWQMethod()
