"""AWQ and SmoothQuant: folding changes nothing, searching never makes it worse."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quant.layer import AffineLinear
from quant.methods.awq import channel_scales
from quant.methods.base import LayerRecord
from quant.methods.rehearsal import Rehearsal
from quant.methods.scaling import channels_of, folded_norm
from quant.methods.search import search_scales
from quant.methods.smoothquant import rounding_activations, smoothing_scales
from quant.numerics import ranges
from quant.scheme import Scheme
from tests.quant.methods.models import (
    ARCHITECTURES,
    FOUNDERS,
    MIXTURES,
    block_error,
    block_of,
    inputs_of,
    plans_for,
    random_model,
    run,
)

# of both blocks, where not all four groups can be: with biases of v and up, of v, with fused linears, without
# norms before attention and MLP, with a bias of everything
FOLDED = {
    "LlamaForCausalLM": 4,
    "Qwen2ForCausalLM": 6,
    "Phi3ForCausalLM": 4,
    "Olmo2ForCausalLM": 4,
    "Starcoder2ForCausalLM": 0,
}
W4 = Scheme(bits=4, group=32)
A4 = replace(W4, symmetric=False)
W8 = Scheme(bits=8, group=None)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in MIXTURES])
def test_rescaling_any_group_leaves_the_logits(architecture: str) -> None:
    model = random_model(architecture)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(ids).logits
        folded = 0
        for index in range(2):
            layer = model.get_submodule(f"model.layers.{index}")
            block = block_of(model, index)
            with Rehearsal(block, inputs_of(model, 1), plans_for(block, W8), 64) as rehearsal:
                for group in block.family.scale_groups:
                    if channels := channels_of(block, group, rehearsal.plans):
                        count = channels.heads * channels.size
                        scales = 4.0 ** torch.randn(count, generator=torch.Generator().manual_seed(folded))
                        rehearsal.rescale(group, channels, scales)
                        folded += 1
            states = layer.state_dict(), block.module.state_dict()
            moved = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
            assert bool(moved) is bool(FOLDED.get(architecture, 8))
            layer.load_state_dict(block.module.state_dict())
        after = model(ids).logits
    assert folded == FOLDED.get(architecture, 8)
    assert before.abs().max() > 1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_smoothing_changes_float32_logits_by_less_than_a_ten_thousandth() -> None:
    model = random_model("Qwen3ForCausalLM")
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(3))
    block, inputs = block_of(model), inputs_of(model)
    with torch.no_grad():
        before = model(ids).logits
        with Rehearsal(block, inputs, plans_for(block, W8), 256, rounding_activations) as rehearsal:
            changed = search_scales(rehearsal, smoothing_scales)
            assert any((rehearsal.columns[name] != 1).any() for name in changed)
        model.get_submodule("model.layers.0").load_state_dict(block.module.state_dict())
        after = model(ids).logits
    assert changed
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_a_folded_norm_is_what_a_file_of_16_bits_holds_and_the_scales_make_up_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, generator=generator).bfloat16().float()
    weight[7] = 0.0
    scales = torch.rand(256, generator=generator) + 0.3
    folded, exact = folded_norm(weight, scales)
    assert torch.equal(folded.bfloat16().float(), folded)
    torch.testing.assert_close(folded * exact, weight, rtol=1e-7, atol=0)
    torch.testing.assert_close(exact[8:], scales[8:], rtol=0.005, atol=0)
    assert exact[7] == 1.0
    folded, _ = folded_norm(torch.randn(256, generator=generator), scales)
    assert not torch.equal(folded.half().float(), folded)


@pytest.mark.parametrize("architecture", [*FOUNDERS, "Gemma2ForCausalLM"])
@pytest.mark.parametrize("scheme", [W4, A4])
def test_awq_is_never_worse_than_rounding_to_nearest(architecture: str, scheme: Scheme) -> None:
    model = random_model(architecture)
    inputs, original = inputs_of(model), block_of(model)
    plain, block, told = block_of(model), block_of(model), list[LayerRecord]()
    run("rtn", plain, None, scheme)
    result = run("awq", block, inputs, scheme, told.append)
    assert tuple(told) == result.records
    assert block_error(block, original, inputs) < 0.9 * block_error(plain, original, inputs)
    assert any(record.method == "awq" for record in result.records)
    for record in result.records:
        assert (record.fallback is None) == (record.method == "awq")
        layer = result.layers[record.module.removeprefix("model.layers.0.")]
        assert isinstance(layer, AffineLinear)
        assert layer.scales.dtype == torch.float16


def test_awq_with_nothing_to_try_is_rounding_to_nearest_and_says_so() -> None:
    model = random_model("LlamaForCausalLM")
    plain = run("rtn", block_of(model), None, W4)
    result = run("awq", block_of(model), inputs_of(model), W4, ratios=0, clip=0)
    for one, other in zip(plain.layers.values(), result.layers.values(), strict=True):
        assert isinstance(one, AffineLinear)
        assert isinstance(other, AffineLinear)
        assert torch.equal(one.codes, other.codes)
    for record in result.records:
        assert (record.method, record.loss) == ("rtn", record.rtn_loss)
        assert record.fallback == "no scale and no clip lowered the block's output error"


def test_queries_and_keys_are_not_clipped() -> None:
    model = random_model("MistralForCausalLM")
    block = block_of(model)
    with Rehearsal(block, inputs_of(model), plans_for(block, W4), 512) as rehearsal:
        search_scales(rehearsal, channel_scales(10))
        masters = dict(rehearsal.masters)
    result = run("awq", block_of(model), inputs_of(model), W4, ratios=10)
    clipped = set()
    for name, layer in result.layers.items():
        assert isinstance(layer, AffineLinear)
        low, high = ranges(masters[name], W4)
        if (layer.scales.float() < 0.97 * torch.maximum(-low, high) / 7.5).any():
            clipped.add(name)
    assert clipped
    assert not clipped & {"self_attn.q_proj", "self_attn.k_proj"}


def test_a_group_with_a_linear_that_keeps_its_weights_is_not_rescaled() -> None:
    model = random_model("MistralForCausalLM")
    block, original = block_of(model), block_of(model)
    plans = plans_for(block, W4)
    del plans["mlp.gate_proj"]
    with Rehearsal(block, inputs_of(model), plans, 512) as rehearsal:
        assert search_scales(rehearsal, channel_scales(10)).isdisjoint({"mlp.gate_proj", "mlp.up_proj"})
    norms: list[nn.Module] = [one.module.post_attention_layernorm for one in (block, original)]  # type: ignore[misc]
    assert torch.equal(norms[0].weight, norms[1].weight)  # type: ignore[arg-type]
    assert torch.equal(block.linears["mlp.gate_proj"].weight, original.linears["mlp.gate_proj"].weight)


def test_smoothing_pays_where_activations_have_outliers() -> None:
    model = random_model("LlamaForCausalLM", attention_bias=False, mlp_bias=False)
    model.get_parameter("model.layers.0.input_layernorm.weight").data[5] = 40.0
    inputs, original = inputs_of(model), block_of(model)
    plain, block = block_of(model), block_of(model)
    run("rtn", plain, None, W8)
    with rounding_activations(plain, {}):
        without = block_error(plain, original, inputs)
    result = run("smoothquant", block, inputs, W8)  # leaves the block rounding its activations
    assert block_error(block, original, inputs) < 0.5 * without
    methods = {record.module.rpartition(".")[2]: record.method for record in result.records}
    assert methods["q_proj"] == "smoothquant"
