"""What is foretold of sizes is what is built; what fits comes first."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from quant.errors import BadRecipe
from quant.gguf.kquant import quantize
from quant.recipe import GgufRecipe
from quant.recommend import GGUF_LOSS, Facts, Need, read_facts, recommend
from quant.source import open_source
from tests.quant.checkpoints import write_checkpoint
from tests.quant.gguf.support import converted

ROOMY = Need(memory=1 << 40, context=128, parallel=1)


@pytest.fixture(params=[256, 96], ids=["whole blocks", "odd rows"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", hidden=request.param)


def facts_of(folder: Path) -> Facts:
    return read_facts(open_source(str(folder), cache=folder.parent / "cache"))


def test_weights_are_as_large_as_they_get(folder: Path, tmp_path: Path) -> None:
    base = converted(folder, tmp_path / "base.gguf")
    for option in recommend(facts_of(folder), ROOMY):
        target = tmp_path / "any.gguf"
        quantize(base, target, GgufRecipe(type=option.preset), progress=lambda _done, _total: None, threads=1)
        written = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(target).tensors)
        assert option.weights == written, option.preset
        odd = facts_of(folder).hidden == 96 and option.preset != "q8_0"
        assert (option.fallen_back > 0) == odd


def test_order() -> None:
    facts = facts_of_tiny()
    options = recommend(facts, ROOMY)
    assert {option.preset for option in options} == set(GGUF_LOSS)
    near = [option for option in options if option.near_enough]
    assert list(options[: len(near)]) == sorted(near, key=lambda option: option.total)
    exact = recommend(facts, replace(ROOMY, task="extract"))
    assert exact[0].preset == "q6_k"
    tight = recommend(facts, replace(ROOMY, memory=near[0].total - 1))
    assert not next(option for option in tight if option.preset == near[0].preset).fits
    assert [option.fits for option in tight] == sorted((option.fits for option in tight), reverse=True)


def test_kv_memory_grows_with_context_and_requests() -> None:
    facts = facts_of_tiny()
    one, four = (recommend(facts, replace(ROOMY, parallel=count))[0].kv for count in (1, 4))
    assert one == 2 * facts.layers * facts.kv_heads * facts.head_dim * 2 * 128
    assert four == 4 * one


def test_what_cannot_be_wanted() -> None:
    with pytest.raises(BadRecipe, match="no task 'poetry'"):
        recommend(facts_of_tiny(), replace(ROOMY, task="poetry"))
    with pytest.raises(BadRecipe, match=r"the model's is 1,024"):
        recommend(facts_of_tiny(), replace(ROOMY, context=4096))


def facts_of_tiny() -> Facts:
    return read_facts(open_source("models/tiny-chat", cache=Path("/nonexistent")))
