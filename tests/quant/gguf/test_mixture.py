"""The types that we foretell are those that llama.cpp chooses."""

from pathlib import Path

import gguf
import pytest
import transformers

from quant.gguf.kquant import quantize
from quant.gguf.mixture import Stack, tensor_type
from quant.recipe import GgufRecipe
from tests.quant.gguf.support import checkpoint, converted

TYPES = ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]  # the others take minutes to make
SHAPES = {
    "deep, shared heads, tied": (Stack(layers=17, shared_heads=4, tied=True), 256, 256, 8),
    "own head": (Stack(layers=9, shared_heads=2, tied=False), 256, 768, 4),
    "rows of odd lengths": (Stack(layers=8, shared_heads=1, tied=True), 192, 352, 4),
}


def ignore(_done: int, _total: int) -> None:
    pass


@pytest.mark.parametrize("shape", SHAPES)
def test_types_by_tensor(shape: str, tmp_path: Path) -> None:
    stack, hidden, ffn, heads = SHAPES[shape]
    folder = checkpoint(
        tmp_path / "source",
        transformers.LlamaForCausalLM,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=stack.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // stack.shared_heads,
        tie_word_embeddings=stack.tied,
    )
    base = converted(folder, tmp_path / "base.gguf")
    for kind in TYPES:
        quantize(base, tmp_path / "any.gguf", GgufRecipe(type=kind), progress=ignore, threads=1)
        for tensor in gguf.GGUFReader(tmp_path / "any.gguf").tensors:
            if len(tensor.shape) > 1:
                ours = tensor_type(kind, tensor.name, int(tensor.shape[0]), stack)
                assert ours == tensor.tensor_type.name.lower(), (kind, tensor.name)
