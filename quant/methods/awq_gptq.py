"""AWQ's scales, chosen for what GPTQ will leave, then GPTQ's codes.

Scales that serve round-to-nearest best often harm GPTQ, which makes up for most of the errors that they
would lower. What it cannot make up for is known beforehand: an error e of column j leaves e^2 D_j in the
layer's output, where D_j = 1 / U_jj^2 are the pivots of GPTQ's own factorization (H^-1 = U^T U): that part
of the column's input which the columns behind it cannot imitate. Errors are uniform in a step, so that
scales s leave

    sum over rows and columns of (step(W s)_j / s_j)^2 D_j / 12

which takes one factorization, and for each candidate no more than the steps. Where nothing lowers it by much
the weights stay as they are, and the result is GPTQ's own.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from quant.families import ScaleGroup
from quant.methods.awq import RATIOS, TOKENS, channel_scales, relative_magnitudes
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.gptq import DAMPING, compensate
from quant.methods.layers import affine_scheme
from quant.methods.ranges import by_column
from quant.methods.rehearsal import Rehearsal
from quant.methods.scaling import Channels, channels_of
from quant.methods.search import balanced
from quant.methods.solver import factor
from quant.numerics import affine_parameters

GAIN = 0.9  # of the error that is left: scales that lower it by less are not worth their rounding


class AWQGPTQMethod:
    name = "awq+gptq"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: those of both, without `clip`."""
        assert inputs is not None
        with Rehearsal(block, inputs, plans, int(options.get("tokens", TOKENS))) as rehearsal:
            scale_for_gptq(rehearsal, options)
        done = compensate(block, inputs, rehearsal.masters, plans, options, report, self.name)
        return BlockResult(
            layers={name: one.layer for name, one in done.items()},
            records=tuple(one.record for one in done.values()),
        )


def scale_for_gptq(rehearsal: Rehearsal, options: Mapping[str, float]) -> set[str]:
    """Rescales group after group; the linears whose input was rescaled."""
    changed = set[str]()
    for group in rehearsal.block.family.scale_groups:
        channels = channels_of(rehearsal.block, group, rehearsal.plans)
        if channels is None:
            continue
        hessian = rehearsal.seen[group.linears[0]].hessian
        pivots = _pivots(hessian, options.get("damping", DAMPING))
        if pivots is None:
            continue
        candidates = _candidates(rehearsal, group, channels, pivots, int(options.get("ratios", RATIOS)))
        scales = _best(rehearsal, group, channels, pivots, candidates)
        if scales is not None:
            rehearsal.rescale(group, channels, scales)
            changed |= {*group.linears}
    return changed


def _pivots(hessian: Tensor, damping: float) -> Tensor | None:
    """D_j [in]; None where the Hessian cannot be factored."""
    hessian = hessian.clone()
    hessian.diagonal().masked_fill_(hessian.diagonal() <= 0, 1.0)
    factored = factor(hessian, damping)
    return factored.pivots if factored else None


def _candidates(
    rehearsal: Rehearsal, group: ScaleGroup, channels: Channels, pivots: Tensor, ratios: int
) -> Iterator[Tensor]:
    """AWQ's, and the same with sqrt(D) for the mean activation."""
    yield from channel_scales(ratios)(rehearsal, group, channels)
    needed = channels.reduce(pivots.sqrt())
    weight = channels.reduce(relative_magnitudes(rehearsal, group.linears))
    for step in range(1, ratios):
        ratio = step / ratios
        yield balanced(needed.pow(ratio) / (weight.pow(1.0 - ratio) + 1e-4))
        yield balanced(needed.pow(ratio))


def _best(
    rehearsal: Rehearsal, group: ScaleGroup, channels: Channels, pivots: Tensor, candidates: Iterator[Tensor]
) -> Tensor | None:
    """None where no candidate is better by enough."""
    one = torch.ones_like(pivots)
    least, found = GAIN * _left(rehearsal, group, pivots, one), None
    for scales in candidates:
        error = _left(rehearsal, group, pivots, channels.spread(scales))
        if error < least:
            least, found = error, scales
    return found


def _left(rehearsal: Rehearsal, group: ScaleGroup, pivots: Tensor, columns: Tensor) -> float:
    """The error that GPTQ will leave under these column scales, up to a constant."""
    steps = torch.stack([_squared_steps(rehearsal, name, columns) for name in group.linears]).sum(0)
    return float((steps * pivots / columns.square()).sum())


def _squared_steps(rehearsal: Rehearsal, name: str, columns: Tensor) -> Tensor:
    """[in], summed over the rows."""
    weight, plan = rehearsal.masters[name], rehearsal.plans[name]
    scheme = affine_scheme(rehearsal.block, name, plan)
    scales, _ = affine_parameters(weight * columns, scheme, plan.scale_dtype)
    return by_column(scales.float().square().sum(0, keepdim=True), scheme, weight.shape[1])[0]


AWQ_GPTQ = AWQGPTQMethod()
