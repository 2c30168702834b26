"""The search that AWQ and SmoothQuant share: for each scale group the candidate with the least output error,
kept only where the block's output error falls too."""

from collections.abc import Callable, Iterator

from torch import Tensor

from quant.families import ScaleGroup
from quant.methods.observing import output_error
from quant.methods.rehearsal import Rehearsal
from quant.methods.scaling import Channels, channels_of

Candidates = Callable[[Rehearsal, ScaleGroup, Channels], Iterator[Tensor]]  # scales of the source's channels


def search_scales(rehearsal: Rehearsal, candidates: Candidates) -> set[str]:
    """Rescales group after group; the linears whose input was rescaled."""
    best, changed = rehearsal.block_error(), set[str]()
    for group in rehearsal.block.family.scale_groups:
        channels = channels_of(rehearsal.block, group, rehearsal.plans)
        if channels is None:
            continue
        scales = _best(_Trial(rehearsal, group, channels), candidates(rehearsal, group, channels))
        if scales is None:
            continue
        undo = rehearsal.rescale(group, channels, scales)
        error = rehearsal.block_error()
        if error < best:
            best, changed = error, changed | {*group.linears}
        else:
            undo()
    return changed


def balanced(scales: Tensor) -> Tensor:
    """Around 1: the largest is as far above as the smallest is below."""
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _best(trial: "_Trial", candidates: Iterator[Tensor]) -> Tensor | None:
    """None where no scale is the best."""
    least, found = trial.error(None), None
    for scales in candidates:
        if (error := trial.error(scales)) < least:
            least, found = error, scales
    return found


class _Trial:
    """Output error of the module around a group, its linears rounded under channel scales."""

    def __init__(self, rehearsal: Rehearsal, group: ScaleGroup, channels: Channels) -> None:
        self._rehearsal, self._group, self._channels = rehearsal, group, channels
        self._alone = group.module in group.linears and not rehearsal.rounds_activations
        self._calls = [] if self._alone else rehearsal.calls(group.module)

    def error(self, scales: Tensor | None) -> float:
        it = self._rehearsal
        columns = None if scales is None else self._channels.spread(scales)
        weights = {name: self._rounded(name, columns) for name in self._group.linears}
        if self._alone:  # the Hessian says it all
            name = self._group.module
            return output_error(it.seen[name].hessian, weights[name].sub_(it.masters[name]))
        return it.call_error(self._group.module, self._calls, weights, columns)

    def _rounded(self, name: str, columns: Tensor | None) -> Tensor:
        weight = self._rehearsal.masters[name]
        if columns is None:
            return self._rehearsal.layers[name].dequantize()
        return self._rehearsal.rounded(name, weight * columns).dequantize().div_(columns)
