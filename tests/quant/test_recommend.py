"""What is foretold of sizes is what is built; what fits comes first."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from quant.build_plan import plan_build
from quant.errors import BadRecipe
from quant.gguf.kquant import quantize
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import TORCH_PRESETS, GgufRecipe, parse_recipe
from quant.recommend import Advice, Need, recommend
from quant.recommend.gguf import LOSS as GGUF_LOSS
from quant.recommend.torch_ import LOSS as TORCH_LOSS
from quant.safetensors_header import read_header
from quant.source import Source, open_source
from quant.store import VariantStore
from tests.quant.checkpoints import write_checkpoint
from tests.quant.gguf.support import converted

ROOMY = Need(memory=1 << 40, context=128, parallel=1)
GPU = replace(ROOMY, device="cuda")


@pytest.fixture(params=[256, 96], ids=["whole blocks", "odd rows"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", hidden=request.param)


def opened(path: Path) -> Source:
    return open_source(str(path), cache=path.parent / "cache")


def tiny() -> Source:
    return open_source("models/tiny-chat", cache=Path("/nonexistent"))


def names(advice: Advice) -> set[str]:
    return {option.preset for option in advice.options}


def test_gguf_weights_are_as_large_as_they_get(folder: Path, tmp_path: Path) -> None:
    base = converted(folder, tmp_path / "base.gguf")
    advice = recommend(opened(folder), ROOMY)
    for option in advice.options:
        target = tmp_path / "any.gguf"
        quantize(base, target, GgufRecipe(type=option.preset), progress=lambda _done, _total: None, threads=1)
        written = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(target).tensors)
        assert option.weights == written, option.preset
        odd = advice.facts.hidden == 96 and option.preset != "q8_0"
        assert (option.fallen_back > 0) == odd


def test_torch_weights_are_as_large_as_they_get(tmp_path: Path) -> None:
    """The presets that need no text; where they differ, all differ in codes and scales alone."""
    source = opened(write_checkpoint(tmp_path / "source", hidden=128))
    options = {option.preset: option for option in recommend(source, GPU).options}
    assert set(options) == set(GGUF_LOSS) | set(TORCH_LOSS)
    for preset in ("nf4", "int8", "w8a16"):
        built = build_variant(
            source, parse_recipe(preset), VariantStore(tmp_path / "cache"), progress=ignore, device="cpu"
        )
        infos = [
            i for i in read_header(built.variant.path / "model.safetensors") if "quant_state" not in i.name
        ]
        written = sum(info.end - info.start for info in infos)
        assert options[preset].weights == pytest.approx(written, rel=0.03), preset
    assert options["w8a16"].codes == 2 * options["w4a16"].codes
    assert "calibrated on 128 x 128 tokens" in options["w4a16"].build
    assert "no calibration" in options["nf4"].build


def test_what_cannot_be_made_is_told_of(folder: Path) -> None:
    advice = recommend(opened(folder), GPU)
    odd = advice.facts.hidden == 96
    assert set(advice.refused) == ({"best", "w4a16", "gptq-w4g128", "awq-w4g128", "nf4"} if odd else set())
    assert names(advice) | set(advice.refused) == set(GGUF_LOSS) | set(TORCH_LOSS)
    for preset, why in advice.refused.items():
        assert ("misread rows of 96" if preset == "nf4" else "do not divide into groups of 128") in why
    assert not recommend(opened(folder), ROOMY).refused  # they are for GPUs


def test_presets_are_those_that_there_are() -> None:
    assert set(TORCH_LOSS) <= set(TORCH_PRESETS)
    for preset in TORCH_LOSS:
        assert plan_build(tiny(), parse_recipe(preset), device="cpu").recipe == preset


def test_order() -> None:
    options = recommend(tiny(), ROOMY).options
    assert {option.preset for option in options} == set(GGUF_LOSS)
    near = [option for option in options if option.near_enough(ROOMY)]
    assert list(options[: len(near)]) == sorted(near, key=lambda option: option.total)
    exact = recommend(tiny(), replace(ROOMY, task="extract"))
    assert exact.options[0].preset == "q6_k"
    tight = replace(ROOMY, memory=near[0].total - 1)
    fit = {option.preset: option.fits(tight) for option in recommend(tiny(), tight).options}
    assert not fit[near[0].preset]
    assert list(fit.values()) == sorted(fit.values(), reverse=True)


def test_a_gguf_file_is_judged_as_the_checkpoint_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", hidden=256)
    file = converted(folder, tmp_path / "base.gguf")
    ours, theirs = recommend(opened(folder), GPU), recommend(opened(file), GPU)
    assert theirs.facts.parameters == ours.facts.parameters
    expected = {option.preset: option.total for option in ours.options if option.format == "gguf"}
    found = {option.preset: option.total for option in theirs.options}
    own = theirs.facts.stored
    assert own is not None
    assert found.pop(own) > max(expected.values())
    assert found == expected


def test_a_quantized_gguf_file_stays_what_it_is(tmp_path: Path) -> None:
    base = converted(write_checkpoint(tmp_path / "source", hidden=256), tmp_path / "base.gguf")
    file = tmp_path / "small.gguf"
    quantize(base, file, GgufRecipe(type="q4_k_m"), progress=lambda _done, _total: None, threads=1)
    (option,) = recommend(opened(file), ROOMY).options
    assert (option.preset, option.loss) == ("q4_k_m", GGUF_LOSS["q4_k_m"])
    assert option.weights == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)


def test_kv_memory_grows_with_context_and_requests() -> None:
    one, four = (recommend(tiny(), replace(ROOMY, parallel=count)) for count in (1, 4))
    facts = one.facts
    assert one.options[0].kv == 2 * facts.layers * facts.kv_heads * facts.head_dim * 2 * 128
    assert four.options[0].kv == 4 * one.options[0].kv
    whole = recommend(tiny(), replace(ROOMY, context=None))
    assert whole.options[0].kv == one.options[0].kv * facts.context // 128


def test_what_cannot_be_wanted() -> None:
    with pytest.raises(BadRecipe, match="no task 'poetry'"):
        recommend(tiny(), replace(ROOMY, task="poetry"))
    with pytest.raises(BadRecipe, match=r"the model's is 1,024"):
        recommend(tiny(), replace(ROOMY, context=4096))
