"""Searching among compressed-tensors checkpoints: 4 or 8 bits, or none, for each group of linears.

Sensitivities and probes are rounded to nearest; what is built is GPTQ, which only comes nearer to the source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quant.recipe import TORCH_PRESETS, TorchRecipe, parse_recipe
from quant.search.space import Group, Preset, Space, from_large, grouped, main_kind, overrides_of
from quant.source import Source
from quant.torch_plan import TorchPlan, plan_torch

FORMAT = "compressed-tensors"
PRESETS = ("w8a16", "w4a16")
LADDER = ("keep", "int8", "int4")
GROUPS = (128, 64, 32)
INT8: dict[str, Any] = {"bits": 8, "group": None, "symmetric": True}


def torch_space(source: Source, *, most_groups: int) -> Space:
    """Raises BadRecipe, BadSource."""
    int4 = _plan(source, _spec(_scheme4(source)))
    int8 = _plan(source, _spec(INT8))
    kept = {one.module: one.shape[0] * one.shape[1] * 2 for one in int4.modules}
    fixed = int4.output_bytes - sum(one.bytes for one in int4.modules)
    sizes = {
        one.module: {"keep": kept[one.module], "int8": other.bytes, "int4": one.bytes}
        for one, other in zip(int4.modules, int8.modules, strict=True)
    }
    names = grouped(sizes, lambda role: role, most_groups)
    groups = tuple(_group(label, some, sizes) for label, some in names)
    scheme = _scheme4(source)
    presets = from_large(
        Preset(name=name, bytes=_plan(source, TORCH_PRESETS[name].spec).output_bytes) for name in PRESETS
    )
    return Space(
        groups=groups,
        presets=presets,
        fixed=fixed,
        elements=int4.layout.elements,
        make=lambda types, those: torch_mixture(types, those, scheme),
        words=(
            f"presets {', '.join(PRESETS)}; mixtures of {', '.join(LADDER)} over {len(groups)} groups of "
            "linears, by GPTQ"
        ),
    )


def torch_mixture(
    types: Mapping[str, str], groups: Sequence[Group], scheme4: Mapping[str, Any], method: str = "gptq"
) -> TorchRecipe:
    schemes: dict[str, Any] = {"keep": None, "int8": INT8, "int4": dict(scheme4)}
    base = main_kind(types, groups, without="keep") or "int8"
    overrides = [[pattern, schemes[kind]] for pattern, kind in overrides_of(types, groups) if kind != base]
    spec = {"method": method, "format": FORMAT, "scheme": schemes[base], "overrides": overrides}
    found = parse_recipe(spec)
    assert isinstance(found, TorchRecipe)
    return found


def rounded_to_nearest(recipe: TorchRecipe) -> TorchRecipe:
    """The same without calibration, for a probe."""
    spec = {name: value for name, value in recipe.spec.items() if name != "calibration"}
    found = parse_recipe({**spec, "method": "rtn"})
    assert isinstance(found, TorchRecipe)
    return found


def torch_alone(name: str, kind: str, space: Space) -> TorchRecipe:
    """One group at `kind`, everything else as it is."""
    types = {group.name: kind if group.name == name else "keep" for group in space.groups}
    made = space.recipe(types)
    assert isinstance(made, TorchRecipe)
    return rounded_to_nearest(made)


def _group(label: str, names: Sequence[str], sizes: Mapping[str, Mapping[str, int]]) -> Group:
    return Group(
        name=label,
        tensors=tuple(names),
        weights=sum(sizes[name]["keep"] // 2 for name in names),
        sizes={kind: sum(sizes[name][kind] for name in names) for kind in LADDER},
    )


def _plan(source: Source, spec: Mapping[str, Any]) -> TorchPlan:
    recipe = parse_recipe(spec)
    assert isinstance(recipe, TorchRecipe)
    return plan_torch(source, recipe)


def _spec(scheme: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "rtn", "format": FORMAT, "scheme": dict(scheme)}


def _scheme4(source: Source) -> dict[str, Any]:
    """The widest groups that every linear divides into."""
    columns = {one.shape[1] for one in _plan(source, _spec(INT8)).modules}
    group = next((size for size in GROUPS if all(one % size == 0 for one in columns)), None)
    return {"bits": 4, "group": group, "symmetric": True}
