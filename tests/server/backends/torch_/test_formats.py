"""Every format on the CPU: the model of its decoded weights, or the arithmetic of 8-bit activations."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from quant.layer import AffineLinear, Int8Linear, QuantizedLinear
from server.backends.torch_.linear.merged import Part
from server.types import Generate, SamplingParams
from tests.server.backends.llama.support import TEXTS
from tests.server.backends.torch_.quantized import KINDS, WEIGHT_ONLY, write, write_decoded
from tests.server.backends.torch_.support import Answer, Reference, open_model, serve

NEAR_TIE = 1e-3
NEAR = 2e-4


@pytest.fixture(scope="module")
def prompts(tiny_chat: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    return [tokenizer.encode(text)[:-3] for text in TEXTS[:3]]


def answers_of(folder: Path, prompts: list[list[int]], size: int = 64, **options: str) -> list[Answer]:
    executor = open_model(folder, options=options)
    wanted = SamplingParams(max_tokens=size, temperature=0.0, logprobs=2, reproducible=False)
    requests = [
        Generate(id=str(number), prompt=tuple(prompt), params=wanted) for number, prompt in enumerate(prompts)
    ]
    answers, _ = serve(executor, requests)
    executor.close()
    return [answers[request.id] for request in requests]


def require_greedy(reference: Reference, prompt: list[int], answer: Answer) -> None:
    """Each token is transformers' best one, or as good as that."""
    table = reference.logprobs([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
    for row, token in zip(table, answer.tokens, strict=True):
        assert row.max() - row[token] < NEAR_TIE


@pytest.mark.parametrize(
    ("kind", "weights"), [*((kind, "dense") for kind in WEIGHT_ONLY), ("nf4", "packed"), ("awq", "packed")]
)
def test_greedy_text_is_that_of_the_decoded_weights(
    kind: str, weights: str, tiny_chat: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    layers = write(tmp_path / "variant", tiny_chat, kind)
    reference = Reference.of(write_decoded(tmp_path / "decoded", tiny_chat, layers))
    few, size = (prompts, 64) if weights == "dense" else (prompts[:1], 8)
    answers = answers_of(tmp_path / "variant", few, size, weights=weights)
    for prompt, answer in zip(few, answers, strict=True):
        assert len(answer.tokens) == size
        require_greedy(reference, prompt, answer)


class Int8Arithmetic(nn.Module):
    """LLM.int8 and dynamic W8A8 written out with integers; outliers of a row are multiplied apart."""

    def __init__(self, codes: Tensor, scales: Tensor, threshold: float) -> None:
        super().__init__()
        self.codes, self.scales, self.threshold = codes.long().numpy(), scales.double(), threshold

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        outliers = torch.where(flat.abs() >= self.threshold, flat, 0.0).double()
        inside = torch.where(flat.abs() < self.threshold, flat, 0.0)
        step = inside.abs().amax(-1, keepdim=True) / 127
        rows = (inside / step.clamp_min(1e-38)).round().long().numpy()
        assert abs(rows).max() <= 127
        sums = torch.from_numpy(rows @ self.codes.T).double()  # of 64-bit integers
        apart = torch.from_numpy(outliers.numpy() @ self.codes.T.astype(float))
        out = (sums * step.double() + apart) * self.scales
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def exact_layer(layer: QuantizedLinear) -> Int8Arithmetic:
    if isinstance(layer, Int8Linear):
        return Int8Arithmetic(layer.codes, layer.absmax / 127, 6.0)
    assert isinstance(layer, AffineLinear)
    return Int8Arithmetic(layer.codes.int() - 128, layer.scales[:, 0], torch.inf)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_8_bit_activations_are_those_of_integer_arithmetic(
    kind: str, weights: str, tiny_chat: Path, tmp_path: Path
) -> None:
    """But for float32's last bits; and a row has the very same numbers alone as among others."""
    layers = write(tmp_path, tiny_chat, kind)
    executor = open_model(tmp_path, options={"weights": weights, "fused": "false"})
    rows = torch.randn(9, 1024, generator=torch.Generator().manual_seed(1)) * 2.5  # some beyond 6
    rows[4] *= 0.1  # a row without any
    for name, layer in layers.items():
        x, module = rows[:, : layer.shape[1]], executor._model.get_submodule(name)
        found, exact = alone(module, x), exact_layer(layer)(x)
        assert (found - exact).abs().max() < 1e-6 * exact.abs().max()
        for row in range(len(x)):
            assert torch.equal(alone(module, x[row : row + 1]), found[row : row + 1])
    executor.close()


def alone(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives. Of layers that share their input each keeps its part of a call until it is asked
    for: what is asked here is asked of one layer, with an input that no call had before."""
    found: Tensor = module(x.clone())
    return found


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_8_bit_answers_are_those_of_integer_arithmetic(
    kind: str, tiny_chat: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """To the last bits, but for the few short prompts in which a rounding falls the other way."""
    layers = write(tmp_path, tiny_chat, kind)
    exact = Reference.of(tiny_chat)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(exact.model.get_submodule(parent), child, exact_layer(layer))
    short = [prompt[at : at + 3] for prompt in prompts for at in range(0, 12, 3)]
    answers = answers_of(tmp_path, short, 1)
    differences = [max(exact.differences(p, answer)) for p, answer in zip(short, answers, strict=True)]
    assert sum(difference < NEAR for difference in differences) > len(short) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_their_input_are_one_matrix(kind: str, tiny_chat: Path, tmp_path: Path) -> None:
    write(tmp_path, tiny_chat, kind)
    executor = open_model(tmp_path, options={"fused": "false"})
    layer = executor._model.model.layers[0]
    for parts in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        assert all(isinstance(part, Part) for part in parts)
    executor.close()
