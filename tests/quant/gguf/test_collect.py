"""Our own importance matrices: the sums of what flows into the linears, as torch sees it."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from quant.errors import BadSource
from quant.gguf.collect import collect
from quant.gguf.imatrix import Sums, read_imatrix, write_imatrix
from quant.gguf.kquant import quantize
from quant.recipe import GgufRecipe
from tests.quant.gguf.support import checkpoint, converted

TEXTS = [[int(token) for token in np.random.default_rng(seed).integers(0, 400, 40)] for seed in range(3)]
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def ignore(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(
        tmp_path_factory.mktemp("source"),
        transformers.Qwen2ForCausalLM,
        hidden_size=256,
        intermediate_size=512,
    )


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return converted(folder, folder / "base.gguf")


@pytest.fixture(scope="module")
def sums(base: Path) -> Sums:
    return collect(base, TEXTS, progress=ignore, threads=1)


def squares_by_torch(folder: Path) -> dict[str, np.ndarray]:
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, np.ndarray] = {}
    for layer, block in enumerate(model.model.layers):
        for name, tensor in LINEARS.items():

            def add(
                _module: object, inputs: tuple[torch.Tensor], key: str = f"blk.{layer}.{tensor}.weight"
            ) -> None:
                squares = inputs[0].double().square().sum(dim=(0, 1)).numpy()
                found[key] = found.get(key, 0.0) + squares

            block.get_submodule(name).register_forward_pre_hook(add)
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([text]))
    return found


def test_the_sums_are_those_of_torch(folder: Path, sums: Sums) -> None:
    expected = squares_by_torch(folder)
    assert sums.squares.keys() == expected.keys()
    for name, values in sums.squares.items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, atol=1e-4 * expected[name].mean())
        assert sums.counts[name] == sum(map(len, TEXTS))


def test_written_and_read_again(sums: Sums, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_imatrix(tmp_path / name, sums, text="calibration", chunk_tokens=40)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = read_imatrix(tmp_path / "one")
    assert again.keys() == sums.importance.keys()
    assert all(np.array_equal(again[name], values) for name, values in sums.importance.items())


def test_types_that_need_one_are_made_with_it(base: Path, sums: Sums, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", sums, text="calibration", chunk_tokens=40)
    recipe = GgufRecipe(type="iq2_xxs", imatrix=str(tmp_path / "imatrix.gguf"))
    quantize(base, tmp_path / "small.gguf", recipe, progress=ignore, threads=1)
    assert (tmp_path / "small.gguf").stat().st_size < base.stat().st_size / 5


def test_what_cannot_be_collected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="there is none"):
        collect(base, [[]], progress=ignore, threads=1)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BadSource, match=r"cannot open no\.gguf"):
        collect(tmp_path / "no.gguf", TEXTS, progress=ignore, threads=1)
