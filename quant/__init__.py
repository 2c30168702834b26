"""Quantized variants of language models: built once, addressed by content. Usable without the server.

    source = open_source("models/tiny-chat", cache=cache)
    recipe = parse_recipe("gptq-w4g128")
    print(plan_build(source, recipe))
    outcome = build_variant(source, recipe, VariantStore(cache), progress=print)

Names are loaded when they are used, so that importing any module of the package costs that module only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.build_plan import BuildPlan, plan_build
    from quant.errors import QuantError
    from quant.pipeline import Outcome, build_variant
    from quant.progress import Progress
    from quant.recipe import PRESETS, Recipe, parse_recipe
    from quant.source import Source, open_source
    from quant.store import Variant, VariantStore

__all__ = [
    "BuildPlan",
    "Outcome",
    "PRESETS",
    "Progress",
    "QuantError",
    "Recipe",
    "Source",
    "Variant",
    "VariantStore",
    "build_variant",
    "open_source",
    "parse_recipe",
    "plan_build",
]
_HOMES = {
    "BuildPlan": "build_plan",
    "Outcome": "pipeline",
    "PRESETS": "recipe",
    "Progress": "progress",
    "QuantError": "errors",
    "Recipe": "recipe",
    "Source": "source",
    "Variant": "store",
    "VariantStore": "store",
    "build_variant": "pipeline",
    "open_source": "source",
    "parse_recipe": "recipe",
    "plan_build": "build_plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
