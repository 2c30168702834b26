"""GPTQ: round-to-nearest that makes up for its errors, layer by layer.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023. Columns go in the order of falling activation energy (act-order), with scales fixed
beforehand from the weights as they were (static groups), so that the file needs no permutation. Linears go in
the order of computation and see inputs that the quantized ones before them made (true-sequential).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.layer import AffineLinear
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import affine_scheme, float_weight, install
from quant.methods.observing import gram_of, output_error
from quant.methods.ranges import by_column, searched_parameters
from quant.methods.solver import factor, solve
from quant.numerics import affine_parameters, round_to_nearest
from quant.scheme import Scheme

DAMPING = 0.01
ENOUGH = 16  # an expert needs a token for each so many columns
STARVED = "a starved expert"


@dataclass(frozen=True, slots=True, eq=False)
class Compensated:
    """One linear after GPTQ."""

    layer: AffineLinear
    aimed: Tensor  # float32 [out, in]: what was rounded; codes are its nearest (where GPTQ was kept)
    record: LayerRecord


class GPTQMethod:
    name = "gptq"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: `damping` (share of the diagonal); `mse` (0: scales from the extremes, 1: searched)."""
        assert inputs is not None
        weights = {name: float_weight(block, name) for name in plans}
        done = compensate(block, inputs, weights, plans, options, report)
        return BlockResult(
            layers={name: one.layer for name, one in done.items()},
            records=tuple(one.record for one in done.values()),
        )


def compensate(
    block: Block,
    inputs: Activations,
    weights: dict[str, Tensor],
    plans: Mapping[str, LayerPlan],
    options: Mapping[str, float],
    report: Callable[[LayerRecord], None],
    method: str = "gptq",
) -> dict[str, Compensated]:
    """GPTQ of `weights` (emptied on the way), installed in the block group by group."""
    done: dict[str, Compensated] = {}
    for names in shared_groups(block, plans):
        gram = gram_of(block, inputs, names[0])
        routed = gram.tokens if _is_expert(block, names[0]) else None
        for alike in same_plan(names, plans):
            some_weights = {name: weights.pop(name) for name in alike}
            if routed is not None and routed < gram.hessian.shape[0] // ENOUGH:
                solved = _starved(block, some_weights, routed, plans)
            else:
                solved = _solve_alike(block, some_weights, gram.hessian, plans, options)
            some = {name: _named(one, method, routed) for name, one in solved.items()}
            done |= some
            install(block, {name: one.layer for name, one in some.items()})
            for one in some.values():
                report(one.record)
    return done


def _named(one: Compensated, method: str, routed: int | None) -> Compensated:
    """`method`: what GPTQ is a part of. `routed`: tokens that were sent to an expert."""
    record = one.record if one.record.fallback else replace(one.record, method=method)
    return replace(one, record=replace(record, tokens=routed))


def _is_expert(block: Block, linear: str) -> bool:
    experts = block.family.experts
    return experts is not None and linear.startswith(f"{experts.mixture}.experts.")


def _starved(
    block: Block, weights: Mapping[str, Tensor], tokens: int, plans: Mapping[str, LayerPlan]
) -> dict[str, Compensated]:
    """An expert of whose inputs too little is known is rounded to nearest."""
    done = {}
    for name, weight in weights.items():
        plan = plans[name]
        plain = round_to_nearest(weight, affine_scheme(block, name, plan), plan.scale_dtype)
        why = f"{STARVED}: {tokens} tokens of the calibration text"
        record = LayerRecord(module=f"{block.name}.{name}", method="rtn", fallback=why)
        done[name] = Compensated(plain, weight, record)
    return done


def shared_groups(block: Block, plans: Mapping[str, LayerPlan]) -> Iterator[tuple[str, ...]]:
    """Planned linears that share an input, in the order of computation."""
    for group in block.family.shared_inputs:
        if names := tuple(name for name in group if name in plans):
            yield names


def same_plan(names: Sequence[str], plans: Mapping[str, LayerPlan]) -> list[list[str]]:
    """Parts of a group that can be solved as one matrix."""
    parts: dict[LayerPlan, list[str]] = {}
    for name in names:
        parts.setdefault(plans[name], []).append(name)
    return list(parts.values())


def _solve_alike(
    block: Block,
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    plans: Mapping[str, LayerPlan],
    options: Mapping[str, float],
) -> dict[str, Compensated]:
    first = next(iter(weights))
    scheme, dtype = affine_scheme(block, first, plans[first]), plans[first].scale_dtype
    whole = torch.cat(list(weights.values()))
    plain = round_to_nearest(whole, scheme, dtype)
    solved = gptq_matrix(whole, hessian, scheme, dtype, options)
    done, start = {}, 0
    for name, weight in weights.items():
        rows = slice(start, start := start + len(weight))
        module = f"{block.name}.{name}"
        done[name] = _better(module, weight, hessian, _rows(plain, rows), solved and _some(solved, rows))
    return done


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    layer: AffineLinear
    aimed: Tensor
    damping: float


def gptq_matrix(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, options: Mapping[str, float]
) -> Solved | None:
    """None where the Hessian cannot be factored. Inputs that were never seen (zeros on the diagonal) get the
    weight 0, and a 1 on the diagonal."""
    seen = hessian.diagonal() > 0
    hessian = hessian.clone()
    hessian.diagonal().masked_fill_(~seen, 1.0)
    weight = weight * seen
    factored = factor(hessian, options.get("damping", DAMPING))
    if factored is None:
        return None
    if options.get("mse", 1.0):
        scales, zeros = searched_parameters(weight, factored.pivots, scheme, scale_dtype)
    else:
        scales, zeros = affine_parameters(weight, scheme, scale_dtype)
    grid = [by_column(values, scheme, weight.shape[1]) for values in (scales, zeros)]
    solution = solve(weight, factored, grid[0], grid[1], scheme)
    return Solved(AffineLinear(scheme, solution.codes, scales, zeros), solution.aimed, factored.damping)


def _better(
    module: str, weight: Tensor, hessian: Tensor, plain: AffineLinear, solved: Solved | None
) -> Compensated:
    """GPTQ's result, or round-to-nearest's where GPTQ failed or its output error is not the smaller."""
    rtn_loss = output_error(hessian, plain.dequantize() - weight)
    if solved is None:
        why = "the Hessian is not positive definite at any damping"
        record = LayerRecord(module=module, method="rtn", loss=rtn_loss, rtn_loss=rtn_loss, fallback=why)
        return Compensated(plain, weight, record)
    loss = output_error(hessian, solved.layer.dequantize() - weight)
    if not loss <= rtn_loss:
        why = "round-to-nearest has the smaller output error"
        record = LayerRecord(
            module=module,
            method="rtn",
            loss=rtn_loss,
            rtn_loss=rtn_loss,
            damping=solved.damping,
            fallback=why,
        )
        return Compensated(plain, weight, record)
    record = LayerRecord(module=module, method="gptq", loss=loss, rtn_loss=rtn_loss, damping=solved.damping)
    return Compensated(solved.layer, solved.aimed, record)


def _some(solved: Solved, rows: slice) -> Solved:
    return Solved(_rows(solved.layer, rows), solved.aimed[rows], solved.damping)


def _rows(layer: AffineLinear, rows: slice) -> AffineLinear:
    """Copies, so that the whole is not kept alive by its parts."""
    return AffineLinear(
        layer.scheme, layer.codes[rows].clone(), layer.scales[rows].clone(), layer.zeros[rows].clone()
    )


GPTQ = GPTQMethod()
