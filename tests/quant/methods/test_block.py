"""Our blocks compute what transformers' model computes; the family table says what is true of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.block import Decoder
from quant.errors import BadSource, BuildFailed, UnsupportedArchitecture
from quant.families import FAMILIES
from tests.quant.methods.models import (
    ARCHITECTURES,
    block_of,
    config_of,
    inputs_of,
    random_model,
    tensors_of,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_in_turn_are_the_model(architecture: str) -> None:
    model = random_model(architecture)
    ids = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        ours = block_of(model, 1)(block_of(model, 0)(states[0]))
        ours = model.get_submodule("model.norm")(ours)
    torch.testing.assert_close(ours, states[2], rtol=0, atol=2e-5)


def test_the_window_hides_what_is_further_back() -> None:
    blocks = [block_of(random_model("Qwen2ForCausalLM"), index) for index in (0, 1)]
    assert [block.window for block in blocks] == [None, 5]
    assert block_of(random_model("Qwen3ForCausalLM")).window is None
    block, hidden = blocks[1], torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
    changed = hidden.clone()
    changed[:, 3] += 1.0
    moved = (block(hidden) - block(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_bf16_blocks_take_and_give_bf16() -> None:
    block = block_of(random_model("LlamaForCausalLM").bfloat16())
    assert block.dtype == torch.bfloat16
    assert block(torch.randn(1, 8, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", FAMILIES)
def test_linears_share_inputs_and_come_in_the_order_that_the_table_says(architecture: str) -> None:
    model = random_model(architecture)
    block, seen = block_of(model), dict[str, Tensor]()

    def note(name: str) -> Any:
        return lambda _module, inputs: seen.update({name: inputs[0]})

    for name, linear in block.linears.items():
        linear.register_forward_pre_hook(note(name))
    block(inputs_of(model)[0])
    assert list(seen) == list(block.family.linears)
    assert len(seen) == sum(isinstance(m, torch.nn.Linear) for m in block.module.modules())
    for group in block.family.shared_inputs:
        assert len({seen[name].data_ptr() for name in group}) == 1
    groups = block.family.shared_inputs
    assert len({seen[group[0]].data_ptr() for group in groups}) == len(groups)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_name_of_the_table_is_in_the_checkpoint(architecture: str) -> None:
    model = random_model(architecture)
    names, family = dict(model.named_modules()), FAMILIES[architecture]
    assert {family.embedding, family.final_norm, family.head, family.block_name(1)} <= names.keys()
    decoder = Decoder(architecture, config_of(model))
    assert decoder.layers == 2
    assert decoder.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors_of(model, 0).items()}


def test_what_cannot_be_a_block_is_refused_by_name() -> None:
    model = random_model("LlamaForCausalLM")
    decoder = Decoder("LlamaForCausalLM", config_of(model))
    good = model.get_submodule("model.layers.1").state_dict()
    norm, query = "input_layernorm.weight", "self_attn.q_proj.weight"
    broken = good[query].clone()
    broken[3, 5] = torch.nan
    cases = [
        ({name: good[name] for name in good if name != norm}, "no tensor model.layers.1.input_layern"),
        ({**good, "mlp.router.weight": good[norm]}, "model.layers.1.mlp.router.weight has no place"),
        ({**good, query: good[query][:-1]}, r"q_proj.weight: its shape is \[63, 64\], not \[64, 64\]"),
        ({**good, query: broken}, "model.layers.1.self_attn.q_proj.weight: it has NaN"),
    ]
    for tensors, message in cases:
        with pytest.raises(BadSource, match=message):
            decoder.block(1, tensors)
    with pytest.raises(UnsupportedArchitecture, match="'GPT2LMHeadModel' is not supported"):
        Decoder("GPT2LMHeadModel", {})
    with pytest.raises(BadSource, match=r"transformers refuses it: ValueError: The hidden size \(64\)"):
        Decoder("LlamaForCausalLM", {**config_of(model), "num_attention_heads": 7, "head_dim": None})


def test_an_infinite_output_is_laid_to_the_module_that_made_it() -> None:
    model = random_model("LlamaForCausalLM")
    block = block_of(model)
    block.linears["mlp.up_proj"].weight.data.mul_(1e38)
    with pytest.raises(BuildFailed, match=r"^model\.layers\.0\.mlp\.up_proj: its output has NaN or infinite"):
        block(inputs_of(model)[0] * 1e3)
