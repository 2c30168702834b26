"""AWQ with GPTQ, and what is learned on top."""

import pytest
import torch

from quant.layer import AffineLinear
from quant.scheme import Scheme
from tests.quant.methods.models import FOUNDERS, block_error, block_of, inputs_of, random_model, run

W4 = Scheme(bits=4, group=32)


@pytest.mark.parametrize("architecture", FOUNDERS)
def test_each_step_of_the_best_method_lowers_the_error_of_the_block(architecture: str) -> None:
    model = random_model(architecture)
    inputs, original = inputs_of(model), block_of(model)
    errors = {}
    for method in ("rtn", "awq+gptq", "best"):
        block = block_of(model)
        result = run(method, block, None if method == "rtn" else inputs, W4, steps=100)
        errors[method] = block_error(block, original, inputs)
        for name, layer in result.layers.items():
            assert torch.equal(block.linears[name].weight, layer.dequantize())
    assert errors["best"] <= errors["awq+gptq"]
    learned = {record.method for record in result.records} == {"best"}
    assert learned == (errors["best"] < errors["awq+gptq"])
    assert learned or architecture == "LlamaForCausalLM"  # where no step of the descent was an improvement
    assert errors["awq+gptq"] < 0.7 * errors["rtn"]


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
