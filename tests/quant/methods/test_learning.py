"""AWQ with GPTQ, and what is learned on top."""

import pytest
import torch
from torch import Tensor

from quant.layer import AffineLinear
from quant.methods import awq_gptq
from quant.methods.gptq import gptq_matrix
from quant.methods.learning import Sample
from quant.methods.observing import output_error
from quant.methods.rehearsal import Rehearsal
from quant.scheme import Scheme
from tests.quant.methods.models import (
    FOUNDERS,
    block_error,
    block_of,
    inputs_of,
    plans_for,
    random_model,
    run,
)

W4 = Scheme(bits=4, group=32)


@pytest.mark.parametrize("architecture", FOUNDERS)
def test_each_step_of_the_best_method_lowers_the_error_of_the_block(architecture: str) -> None:
    model = random_model(architecture)
    inputs, original = inputs_of(model), block_of(model)
    errors = {}
    for method in ("rtn", "gptq", "awq+gptq", "best"):
        block = block_of(model)
        result = run(method, block, None if method == "rtn" else inputs, W4, steps=40)
        errors[method] = block_error(block, original, inputs)
        for name, layer in result.layers.items():
            assert torch.equal(block.linears[name].weight, layer.dequantize())
    assert errors["best"] <= errors["awq+gptq"]
    learned = {record.method for record in result.records} == {"best"}
    assert learned == (errors["best"] < errors["awq+gptq"])
    assert errors["awq+gptq"] < errors["gptq"] < 0.2 * errors["rtn"]


def test_a_start_that_cannot_be_improved_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Qwen3ForCausalLM")
    inputs = inputs_of(model)
    start = run("awq+gptq", block_of(model), inputs, W4)
    monkeypatch.setattr("quant.methods.learning.REACH", (0.5, 0.5))  # all scales are halved: a disaster
    ours = run("best", block_of(model), inputs, W4, steps=5)
    for one, other in zip(start.layers.values(), ours.layers.values(), strict=True):
        assert isinstance(one, AffineLinear)
        assert isinstance(other, AffineLinear)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
    assert {record.method for record in ours.records} <= {"awq+gptq", "rtn"}


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "best", "smoothquant"])
def test_the_same_input_gives_the_same_bytes_and_no_dtype_is_changed(method: str) -> None:
    model = random_model("MistralForCausalLM").bfloat16()
    inputs = inputs_of(model)
    scheme = (
        Scheme(bits=8, group=None) if method == "smoothquant" else Scheme(bits=4, group=40, symmetric=False)
    )
    blocks = [block_of(model), block_of(model)]
    results = [run(method, block, inputs, scheme, steps=10) for block in blocks]
    for one, other in zip(*(result.layers.values() for result in results), strict=True):
        assert isinstance(one, AffineLinear)
        assert isinstance(other, AffineLinear)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
        assert torch.equal(one.zeros, other.zeros)
    states = [block.module.state_dict() for block in blocks]
    for name, tensor in states[0].items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, states[1][name])


def test_where_no_scale_is_worth_it_the_result_is_gptqs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Qwen2ForCausalLM")
    inputs = inputs_of(model)
    monkeypatch.setattr("quant.methods.awq_gptq.GAIN", 0.0)
    blocks = [block_of(model), block_of(model)]
    for method, block in zip(("gptq", "awq+gptq"), blocks, strict=True):
        run(method, block, inputs, W4)
    states = [block.module.state_dict() for block in blocks]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("architecture", FOUNDERS)
def test_what_scales_leave_to_gptq_is_foretold(architecture: str) -> None:
    """The error falls about as far as the formula says, which runs no GPTQ."""
    block = block_of(model := random_model(architecture))
    group = block.family.scale_groups[0]  # behind the embedding's large channels
    with Rehearsal(block, inputs_of(model), plans_for(block, W4), 512) as rehearsal:
        hessian = rehearsal.seen[group.linears[0]].hessian
        weights = [rehearsal.masters[name] for name in group.linears]
        assert {*group.linears} <= awq_gptq.scale_for_gptq(rehearsal, {})
        columns = rehearsal.columns[group.linears[0]]
        before, after = (_left_by_gptq(weights, hessian, some) for some in (columns**0, columns))
    with Rehearsal(block_of(model), inputs_of(model), plans_for(block, W4), 512) as rehearsal:
        pivots = awq_gptq._pivots(hessian, 0.01)
        assert pivots is not None
        foretold = [awq_gptq._left(rehearsal, group, pivots, some) for some in (columns**0, columns)]
    assert foretold[1] / foretold[0] < awq_gptq.GAIN
    assert after / before == pytest.approx(foretold[1] / foretold[0], abs=0.12)


def _left_by_gptq(weights: list[Tensor], hessian: Tensor, columns: Tensor) -> float:
    left = 0.0
    for weight in weights:
        scaled = hessian / columns / columns[:, None]
        solved = gptq_matrix(weight * columns, scaled, W4, torch.float32, {"mse": 0.0})
        assert solved is not None
        left += output_error(hessian, solved.layer.dequantize() / columns - weight)
    return left


def test_errors_of_large_tokens_count_no_more_than_those_of_small_ones() -> None:
    targets = torch.ones(4, 3, 8)
    targets[:, 0] *= 100.0
    sample = Sample.of(torch.zeros_like(targets), targets)
    assert float(sample.weights.mean()) == pytest.approx(1.0)
    assert torch.allclose(sample.weights * targets.square().mean(-1, keepdim=True), sample.weights[0, 1])
    taught, held = sample.split()
    assert (len(taught.hidden), len(held.hidden)) == (3, 1)
    assert sample.part(torch.tensor([0])).split()[1].hidden.shape[0] == 1
