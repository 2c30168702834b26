"""SmoothQuant: activations that are hard to round are made easier at the weights' expense; then W8A8.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models", ICML 2023. X / s and W * s with s = max|X|^a / max|W|^(1-a) for each channel. The
exponent a is taken from a grid for each group by the error of the output with both sides rounded; a group is
left as it is where the block's output does not gain. Weights are int8 by row, activations int8 by token as
they come.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quant.families import ScaleGroup
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import install
from quant.methods.rehearsal import Rehearsal
from quant.methods.scaling import Channels
from quant.methods.search import balanced, search_scales

TOKENS = 2048
ALPHAS = tuple(0.3 + 0.05 * step for step in range(14))  # 0.3 to 0.95


class SmoothQuantMethod:
    name = "smoothquant"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: `tokens` (looked at by the search). The block rounds its activations from now on."""
        assert inputs is not None
        tokens = int(options.get("tokens", TOKENS))
        with Rehearsal(block, inputs, plans, tokens, rounding_activations) as rehearsal:
            plain = {name: rehearsal.layer_error(name, layer) for name, layer in rehearsal.layers.items()}
            changed = search_scales(rehearsal, smoothing_scales)
            layers = dict(rehearsal.layers)
            records = tuple(_record(rehearsal, name, plain[name], name in changed) for name in plans)
        install(block, layers)
        round_activations(block, plans)
        for record in records:
            report(record)
        return BlockResult(layers=layers, records=records)


def _record(rehearsal: Rehearsal, name: str, rtn_loss: float, changed: bool) -> LayerRecord:
    return LayerRecord(
        module=f"{rehearsal.block.name}.{name}",
        method="smoothquant" if changed else "rtn",
        loss=rehearsal.layer_error(name, rehearsal.layers[name]),
        rtn_loss=rtn_loss,
        fallback=None if changed else "no scale lowered the block's output error",
    )


def smoothing_scales(rehearsal: Rehearsal, group: ScaleGroup, channels: Channels) -> Iterator[Tensor]:
    activation = channels.widest(rehearsal.seen[group.linears[0]].most)
    weights = torch.cat([rehearsal.masters[name] for name in group.linears])
    weight = channels.widest(weights.abs().amax(0))
    for alpha in ALPHAS:
        yield balanced(activation.pow(alpha) / weight.clamp(min=1e-5).pow(1.0 - alpha))


def rounded_by_token(x: Tensor) -> Tensor:
    """The values that int8 codes of each token (the last dimension) stand for, in the dtype of `x`."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127.0
    return (x.float() / scale).round_().mul_(scale).to(x.dtype)


@contextmanager
def rounding_activations(block: Block, columns: Mapping[str, Tensor]) -> Iterator[None]:
    """Inputs of all linears go through int8 inside; of those in `columns` divided by them."""
    handles = round_activations(block, block.linears, columns)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_activations(
    block: Block, names: Mapping[str, Any], columns: Mapping[str, Tensor] | None = None
) -> list[Any]:
    def hook(scales: Tensor | None) -> Any:
        def rounded(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            if scales is None:
                return (rounded_by_token(arguments[0]),)
            return (rounded_by_token(arguments[0] / scales) * scales,)

        return rounded

    return [block.linears[name].register_forward_pre_hook(hook((columns or {}).get(name))) for name in names]


SMOOTHQUANT = SmoothQuantMethod()
