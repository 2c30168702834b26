"""Every method, format and scheme that fit each other: built, close to the source, read by others as here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.methods.registry import method_names
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from quant.torch_plan import plan_torch
from quant.torch_recipe import RULES, TorchRecipe
from tests.quant.formats.references import read_by_others
from tests.quant.methods.models import FOUNDERS
from tests.quant.stream.checkpoints import build, decoded, family_checkpoint, kl, logits_of, source_logits

WORST = {4: 0.5, 8: 0.02}  # nats: these models are random, and have a few large channels


def pairs() -> Iterator[dict[str, Any]]:
    """All methods and schemes of each format with one group, and all groups with round-to-nearest."""
    for name, rule in RULES.items():
        for method in sorted(rule.methods & set(method_names())):
            if not rule.schemes:
                yield {"method": method, "format": name}
            for bits, symmetric in sorted(rule.schemes):
                groups = rule.groups if method == "rtn" else rule.groups[-1:]
                for group in groups:
                    scheme = {"bits": bits, "group": group, "symmetric": symmetric}
                    yield {"method": method, "format": name, "scheme": scheme}
    if "nf4" in method_names():
        yield {"method": "nf4", "format": "bnb4", "options": {"double_quant": 0}}


def label(spec: dict[str, Any]) -> str:
    return " ".join(map(str, [spec["method"], spec["format"], *spec.get("scheme", {}).values()]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: family_checkpoint(folder / name, name) for name in FOUNDERS}


PAIRS = list(enumerate(pairs()))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("number", "spec"), PAIRS, ids=[label(spec) for _, spec in PAIRS])
def test_a_pair_builds_and_is_read_back(
    number: int, spec: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    model = list(models.values())[number % len(models)]
    variant = build(model, spec, tmp_path).variant
    VariantStore(tmp_path).verify(variant.key)
    recipe = parse_recipe(spec)
    assert isinstance(recipe, TorchRecipe)
    plan = plan_torch(open_source(str(model), cache=tmp_path), recipe, "cpu")
    assert plan.output_bytes * 0.7 < variant.manifest.bytes <= plan.output_bytes
    weights = decoded(variant.path, recipe.format)
    ours = logits_of(variant.path, weights)
    bits = recipe.scheme.bits if recipe.scheme else 8 if recipe.format == "bnb8" else 4
    assert kl(source_logits(model), ours) < WORST[bits]
    modules = [one.module for one in plan.modules]
    for name, theirs in read_by_others(variant.path, recipe.format, modules).items():
        assert torch.equal(theirs, weights[f"{name}.weight"].to(theirs.dtype)), name
