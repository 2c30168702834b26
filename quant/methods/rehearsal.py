"""A block in float32 with a sample of what enters it: how far would its output move, quantized so or so?

Searches (AWQ, SmoothQuant, learned rounding) try things out here; what they decide leaves as `masters`, the
rescaled weights in float32, and `layers`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.families import ScaleGroup
from quant.layer import AffineLinear
from quant.methods.base import Activations, Block, LayerPlan
from quant.methods.gptq import shared_groups
from quant.methods.layers import affine_scheme, float_weight
from quant.methods.observing import feed, hessian_of, output_error, sampled
from quant.methods.scaling import Channels, folded_norm
from quant.numerics import round_to_nearest

# What is done to activations while the block is tried: gets the column scales of linears whose weights are
# tried as (W * s) / s while their inputs are still what they were.
Running = Callable[[Block, Mapping[str, Tensor]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Of the inputs of a linear as they were before anything was rescaled."""

    hessian: Tensor  # [in, in], mean of x x^T
    mean: Tensor  # [in], of |x|
    most: Tensor  # [in], of |x|


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module inside the block."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor  # of the module as it was


class Rehearsal:
    """Use as a context: the block is float32 inside and what it was outside."""

    def __init__(
        self,
        block: Block,
        inputs: Activations,
        plans: Mapping[str, LayerPlan],
        tokens: int,
        running: Running | None = None,
    ) -> None:
        self.block, self.plans = block, plans
        self.rounds_activations = running is not None
        self._running = running or (lambda _block, _scales: nullcontext())
        self.dtype = block.linears[next(iter(block.linears))].weight.dtype
        self.masters = {name: float_weight(block, name) for name in plans}
        self._sample = sampled(inputs, tokens)

    def __enter__(self) -> "Rehearsal":
        self._tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.dtype != torch.float32  # errors of 2^-11, squared
        self.block.module.float()
        self.hidden = [hidden.float() for hidden in self._sample]
        with torch.no_grad():
            self.targets = [self.block(hidden) for hidden in self.hidden]
        self.seen: dict[str, Seen] = {}
        for names in shared_groups(self.block, self.plans):
            self.seen |= dict.fromkeys(names, _observe(self.block, self.hidden, names[0]))
        # What was done to weights: W now = rows * W then * columns
        self.columns = {name: torch.ones_like(weight[0]) for name, weight in self.masters.items()}
        self.rows = {name: torch.ones_like(weight[:, 0]) for name, weight in self.masters.items()}
        self.layers = {name: self.rounded(name, weight) for name, weight in self.masters.items()}
        return self

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._tf32
        for (
            name,
            master,
        ) in self.masters.items():  # a copy: the block's weights change later
            self.block.linears[name].weight.data = master.to(self.dtype, copy=True)
        self.block.module.to(self.dtype)

    def rounded(self, name: str, weight: Tensor) -> AffineLinear:
        plan = self.plans[name]
        return round_to_nearest(weight, affine_scheme(self.block, name, plan), plan.scale_dtype)

    @torch.no_grad()
    def block_error(self, layers: Mapping[str, AffineLinear] | None = None) -> float:
        """Mean squared error of the block's output with these layers (None: the ones chosen so far)."""
        chosen = self.layers if layers is None else layers
        with (
            self.holding({name: layer.dequantize() for name, layer in chosen.items()}),
            self._running(self.block, {}),
        ):
            errors = [
                (self.block(hidden) - target).square().mean()
                for hidden, target in zip(self.hidden, self.targets, strict=True)
            ]
        return float(torch.stack(errors).mean())

    def layer_error(self, name: str, layer: AffineLinear) -> float:
        """Mean squared error of the linear's own output, in the units of the weight as it was."""
        difference = layer.dequantize().sub_(self.masters[name])
        difference.div_(self.columns[name]).div_(self.rows[name][:, None])
        return output_error(self.seen[name].hessian, difference)

    def gram(self, name: str) -> Tensor:
        """The Hessian of the linear's inputs as they are now, rescaled."""
        columns = self.columns[name]
        return self.seen[name].hessian / columns / columns[:, None]

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The block computes with these weights inside."""
        before = {name: self.block.linears[name].weight.data for name in weights}
        try:
            for name, weight in weights.items():
                self.block.linears[name].weight.data = weight
            yield
        finally:
            for name, weight in before.items():
                self.block.linears[name].weight.data = weight

    @torch.no_grad()
    def calls(self, module: str) -> list[Call]:
        """What the module is called with when the sample runs through the block as it is."""
        seen: list[Call] = []

        def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen.append(Call(arguments, named, first_of(output)))

        handle = self.block.module.get_submodule(module).register_forward_hook(note, with_kwargs=True)
        try:
            for hidden in self.hidden:
                self.block(hidden)
        finally:
            handle.remove()
        return seen

    @torch.no_grad()
    def call_error(
        self, module: str, calls: list[Call], weights: Mapping[str, Tensor], columns: Tensor | None
    ) -> float:
        """Mean squared error of the module's output with these weights, tried under these column scales."""
        target = self.block.module.get_submodule(module)
        scales = {} if columns is None else dict.fromkeys(weights, columns)
        with self.holding(weights), self._running(self.block, scales):
            errors = [
                (first_of(target(*call.arguments, **call.named)) - call.output).square().mean()
                for call in calls
            ]
        return float(torch.stack(errors).mean())

    def rescale(self, group: ScaleGroup, channels: Channels, scales: Tensor) -> Callable[[], None]:
        """Folds `scales` [source's channels] and rounds what changed anew; what is returned undoes it."""
        source: Any = self.block.module.get_submodule(group.source)
        touched = [*group.linears, *([group.source] if group.source in self.masters else [])]
        undo = self._saved(touched, source)
        if group.source in self.masters:
            self._scale_rows(group.source, scales)
        else:
            offset = self.block.family.norm_offset
            source.weight.data, scales = folded_norm(source.weight.data, scales, offset)
        for name in group.linears:
            self._scale_columns(name, channels.spread(scales))
        for name in touched:
            self.layers[name] = self.rounded(name, self.masters[name])
        return undo

    def _scale_rows(self, name: str, scales: Tensor) -> None:
        self.masters[name] = self.masters[name] / scales[:, None]
        self.rows[name] = self.rows[name] / scales
        self.block.linears[name].weight.data = self.masters[name]

    def _scale_columns(self, name: str, scales: Tensor) -> None:
        self.masters[name] = self.masters[name] * scales
        self.columns[name] = self.columns[name] * scales
        self.block.linears[name].weight.data = self.masters[name]

    def _saved(self, names: list[str], source: Any) -> Callable[[], None]:
        parts: tuple[dict[str, Any], ...] = (self.masters, self.columns, self.rows, self.layers)
        before = [{name: part[name] for name in names} for part in parts]
        weights = {name: self.block.linears[name].weight.data for name in names}
        own = source.weight.data

        def undo() -> None:
            for part, values in zip(parts, before, strict=True):
                part.update(values)
            for name, weight in weights.items():
                self.block.linears[name].weight.data = weight
            source.weight.data = own

        return undo


def _observe(block: Block, hidden: list[Tensor], linear: str) -> Seen:
    sums, most = list[Tensor](), list[Tensor]()

    def note(x: Tensor) -> None:
        sums.append(x.abs().mean(0))
        most.append(x.abs().amax(0))

    feed(block, hidden, linear, note)
    if not sums:  # an expert that no token of the sample was sent to
        sums = most = [torch.zeros_like(block.linears[linear].weight[0])]
    return Seen(hessian_of(block, hidden, linear), torch.stack(sums).mean(0), torch.stack(most).amax(0))


def first_of(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor
