"""GPTQ: against a literal writing-down of the paper's algorithm, and what it is for: less error than RTN."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.errors import BadSource
from quant.layer import AffineLinear
from quant.methods import gptq
from quant.methods.base import LayerPlan, LayerRecord
from quant.methods.gptq import gptq_matrix
from quant.methods.observing import hessian_of, output_error
from quant.methods.ranges import by_column, searched_parameters
from quant.methods.solver import LADDER, factor, solve
from quant.numerics import affine_parameters, round_to_nearest
from quant.scheme import Scheme
from tests.quant.methods.models import FOUNDERS, block_of, inputs_of, random_model, run

W4 = Scheme(bits=4, group=32)


def correlated(columns: int, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """(inputs, their Hessian): a few directions carry most of the energy, as in real models."""
    generator = torch.Generator().manual_seed(columns)
    few = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    x = 2.0 * few + 0.5 * torch.randn(tokens, columns, generator=generator)
    return x, x.T @ x / tokens


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def by_the_paper(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, damping: float) -> Tensor:
    """OBQ's update, one column after the other, in float64, the inverse taken anew for what remains."""
    hessian, weight, codes = hessian.double(), weight.double(), torch.zeros_like(weight)
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    left = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        i = left[0]
        codes[:, i] = (weight[:, i] / scales[:, i] + zeros[:, i]).round().clamp(0, 15)
        lost = weight[:, i] - (codes[:, i] - zeros[:, i]) * scales[:, i]
        weight[:, left] -= torch.outer(lost / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [40, 160])  # within, and more than, one lazy batch
def test_codes_are_those_of_the_paper(symmetric: bool, columns: int) -> None:
    scheme = replace(W4, symmetric=symmetric)
    weight, (_, hessian) = weight_of(24, columns), correlated(columns)
    scales, zeros = (by_column(v, scheme, columns) for v in affine_parameters(weight, scheme, torch.float16))
    factored = factor(hessian, 0.01)
    assert factored is not None
    ours = solve(weight, factored, scales, zeros, scheme)
    theirs = by_the_paper(weight, hessian, scales, zeros, 0.01)
    assert (ours.codes == theirs).double().mean() > 0.999  # float32 may turn a near tie
    again = (ours.aimed / scales + zeros).round().clamp(0, 15)
    assert (ours.codes == again).double().mean() > 0.999


@pytest.mark.parametrize(
    "scheme", [W4, Scheme(bits=4, group=128, symmetric=False), Scheme(bits=8, group=None)]
)
@pytest.mark.parametrize("columns", [128, 100])  # 100: a shorter last group
def test_the_output_error_is_below_that_of_rounding_to_nearest(scheme: Scheme, columns: int) -> None:
    weight, (x, hessian) = weight_of(48, columns), correlated(columns)
    solved = gptq_matrix(weight, hessian, scheme, torch.float16, {})
    assert solved is not None
    plain = round_to_nearest(weight, scheme, torch.float16)
    ours, theirs = (
        (x @ (layer.dequantize() - weight).T).square().mean().item() for layer in (solved.layer, plain)
    )
    assert ours < 0.6 * theirs
    assert output_error(hessian, plain.dequantize() - weight) == pytest.approx(theirs, rel=1e-3)


def test_a_searched_range_has_the_lesser_weighed_error() -> None:
    weight, (_, hessian) = weight_of(16, 128), correlated(128)
    weight[:, 5] *= 4.0

    def error(scales: Tensor, zeros: Tensor) -> float:
        codes = (weight / by_column(scales, W4, 128) + by_column(zeros, W4, 128)).round().clamp(0, 15)
        layer = AffineLinear(W4, codes.to(torch.uint8), scales, zeros)
        return float(((layer.dequantize() - weight).square() * hessian.diagonal()).sum())

    searched = searched_parameters(weight, hessian.diagonal(), W4, torch.float16)
    assert error(*searched) < 0.95 * error(*affine_parameters(weight, W4, torch.float16))


def test_inputs_that_were_never_seen_get_the_weight_nought_and_cost_nothing() -> None:
    weight, (x, _) = weight_of(16, 64), correlated(64)
    x[:, [3, 40]] = 0.0
    solved = gptq_matrix(weight, x.T @ x / len(x), W4, torch.float16, {})
    assert solved is not None
    assert solved.damping == 0.01
    assert not solved.layer.dequantize()[:, [3, 40]].any()
    assert solved.layer.dequantize()[:, [2, 4]].any()


def test_the_damping_climbs_until_the_matrix_can_be_factored() -> None:
    hessian = torch.diag(torch.linspace(1.0, 0.99, 8))
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05: rounding errors can do that
    found = factor(hessian, 0.01)
    assert found is not None
    assert found.damping == pytest.approx(0.1)  # .01 and .03 are too little
    damped = hessian + found.damping * hessian.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(found.upper.T @ found.upper, torch.linalg.inv(damped))
    assert factor(hessian - 3.0 * torch.eye(8), 0.01) is None
    assert factor(torch.full((8, 8), torch.nan), 0.01) is None
    assert list(LADDER) == sorted(LADDER)


def test_a_pivot_is_what_the_columns_behind_cannot_make_up_for() -> None:
    _, hessian = correlated(12)
    found = factor(hessian, 1e-5)
    assert found is not None
    place = 4  # of the fifth column that is rounded, all others behind it are free
    column, behind = found.order[place], found.order[place + 1 :]
    explained = torch.linalg.solve(hessian[behind][:, behind], hessian[behind][:, column])
    left = hessian[column, column] - hessian[column, behind] @ explained
    assert float(found.pivots[column]) == pytest.approx(float(left), rel=1e-2)


def test_a_layer_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("LlamaForCausalLM")
    monkeypatch.setattr(gptq, "factor", lambda *_: None)
    result = run("gptq", block_of(model), inputs_of(model), W4)
    for record in result.records:
        assert (record.method, record.damping) == ("rtn", None)
        assert record.fallback == "the Hessian is not positive definite at any damping"
        assert record.loss == record.rtn_loss
    name = "mlp.up_proj"
    weight = block_of(model).linears[name].weight
    kept = result.layers[name]
    assert isinstance(kept, AffineLinear)
    assert torch.equal(kept.codes, round_to_nearest(weight, W4, torch.float16).codes)


@pytest.mark.parametrize("architecture", FOUNDERS)
def test_each_layer_of_each_family_beats_rtn_on_what_it_will_see(architecture: str) -> None:
    model = random_model(architecture)
    block, inputs, told = block_of(model), inputs_of(model), list[LayerRecord]()
    original = {name: linear.weight.clone() for name, linear in block.linears.items()}
    result = run("gptq", block, inputs, W4, told.append)
    assert tuple(told) == result.records
    assert list(result.layers) == list(block.family.linears)
    for record in result.records:
        name = record.module.removeprefix("model.layers.0.")
        assert (record.method, record.fallback, record.damping) == ("gptq", None, 0.01)
        assert record.loss is not None
        assert record.rtn_loss is not None
        assert record.loss < 0.8 * record.rtn_loss
        # The linears before it are quantized for good, so this is the very input of the record's figures.
        hessian = hessian_of(block, inputs, name)
        layer = result.layers[name]
        assert torch.equal(block.linears[name].weight, layer.dequantize())
        assert record.loss == pytest.approx(output_error(hessian, layer.dequantize() - original[name]), 1e-3)


def test_linears_without_a_plan_stay_and_two_schemes_of_one_input_are_kept_apart() -> None:
    model = random_model("Qwen2ForCausalLM")
    block, original = block_of(model), block_of(model)
    inputs = inputs_of(model)
    plans = {
        "self_attn.q_proj": LayerPlan(scheme=W4, scale_dtype=torch.float16),
        "self_attn.v_proj": LayerPlan(scheme=Scheme(bits=8, group=None), scale_dtype=torch.float16),
    }
    result = gptq.GPTQ.quantize(block, inputs, plans, {}, lambda _: None)
    assert [layer.scheme.bits for layer in result.layers.values() if isinstance(layer, AffineLinear)] == [
        4,
        8,
    ]
    for name, linear in block.linears.items():
        assert torch.equal(linear.weight, original.linears[name].weight) == (name not in plans)


def test_the_same_input_gives_the_same_bytes() -> None:
    model = random_model("Qwen3ForCausalLM")
    results = [run("gptq", block_of(model), inputs_of(model), W4) for _ in range(2)]
    for one, other in zip(*(result.layers.values() for result in results), strict=True):
        assert isinstance(one, AffineLinear)
        assert isinstance(other, AffineLinear)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_no_numbers_are_refused_by_name(method: str) -> None:
    model = random_model("LlamaForCausalLM")
    block = block_of(model)
    block.linears["mlp.gate_proj"].weight.data[1, 1] = torch.inf
    with pytest.raises(BadSource, match=r"^model\.layers\.0\.mlp\.gate_proj\.weight: it has NaN or infinite"):
        run(method, block, inputs_of(model), W4)
