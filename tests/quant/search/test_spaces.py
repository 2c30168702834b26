"""Spaces of real checkpoints: bytes as they will be, and recipes that name each matrix once."""

import re
from pathlib import Path

import pytest

from quant.gguf.header import read_header
from quant.recipe import GgufRecipe, TorchRecipe, parse_recipe
from quant.search.gguf_space import gguf_alone, gguf_space
from quant.search.space import Space
from quant.search.torch_space import rounded_to_nearest, torch_alone, torch_space
from quant.source import open_source
from tests.conftest import build
from tests.quant.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), hidden=256, layers=3)


def mixed(space: Space) -> dict[str, str]:
    """Types in turn."""
    return {group.name: group.ladder[number % len(group.ladder)] for number, group in enumerate(space.groups)}


def test_gguf_presets_have_the_bytes_that_were_predicted(source: Path, cache: Path) -> None:
    base = build(cache, source, "f32") / "model.gguf"
    header = read_header(base)
    fixed = base.stat().st_size - sum(one.end - one.start for one in header.tensors)
    space = gguf_space(header, fixed=fixed, most_groups=50)
    assert [group.name for group in space.groups][:2] == ["token_embd", "attn_qkv of block 0"]
    assert len(space.groups) == 1 + 3 * 4
    sizes = {one.name: one.bytes for one in space.presets}
    for name in ("q8_0", "q4_k_m", "q2_k"):
        real = (build(cache, source, name) / "model.gguf").stat().st_size
        assert sizes[name] == pytest.approx(real, abs=4096)
    recipe = space.recipe(mixed(space))
    assert isinstance(recipe, GgufRecipe)
    assert parse_recipe(recipe.spec) == recipe
    for group in space.groups:
        for tensor in group.tensors:
            kinds = [kind for pattern, kind in recipe.overrides if re.search(pattern, tensor)]
            assert kinds == [mixed(space)[group.name]]
    alone = gguf_alone("token_embd", "q8_0", space.groups)
    assert alone.type != "q8_0"
    wide = gguf_space(header, fixed=fixed, most_groups=4)
    assert [group.name for group in wide.groups][1] == "attn_qkv of blocks 0 to 2"


def test_linears_have_the_bytes_that_were_predicted(source: Path, cache: Path) -> None:
    space = torch_space(open_source(str(source), cache=cache), most_groups=50)
    assert len(space.groups) == 3 * 4
    types = mixed(space)
    recipe = space.recipe(types)
    assert isinstance(recipe, TorchRecipe)
    assert parse_recipe(recipe.spec) == recipe
    for group in space.groups:
        for module in group.tensors:
            scheme = recipe.scheme_of(module)
            kind = "keep" if scheme == "keep" else f"int{scheme.bits}"  # type: ignore[union-attr]
            assert kind == types[group.name]
    plain = rounded_to_nearest(recipe)
    assert plain.calibration is None
    one = torch_alone(space.groups[0].name, "int4", space)
    assert {one.scheme_of(name) for name in space.groups[1].tensors} == {"keep"}
    from tests.quant.measure.test_rounding import build_spec

    folder = build_spec(cache, source, dict(plain.spec))
    real = sum(path.stat().st_size for path in folder.iterdir())
    assert space.bytes(types) == pytest.approx(real, rel=0.05)
