"""Which variant a name means, and what opens it."""

import re
from collections.abc import Iterable

from quant.errors import BadRecipe
from quant.plan import variant_key
from quant.recipe import Recipe, parse_recipe
from quant.source import Source
from quant.store import Variant, VariantStore
from server.backends import registry
from server.catalog import Model

_CUSTOM = re.compile(r"custom-[0-9a-f]{8}")


def variant_id(model: Model, name: str) -> str:
    return f"{model.id}:{name}"


def recipe_of(name: str) -> Recipe | None:
    """The recipe of that name; None for a custom one, of which the name says too little, and for nonsense."""
    try:
        return parse_recipe(name)
    except BadRecipe:
        return None


def may_be_a_variant(model: Model, name: str) -> bool:
    """Whether it is worth looking for it on the disk."""
    return is_listed(model, name) or recipe_of(name) is not None or _CUSTOM.fullmatch(name) is not None


def is_listed(model: Model, name: str) -> bool:
    """Whether models.yaml asks for it, so that it is built on demand."""
    return name == model.default or name in model.variants


def find_variant(store: VariantStore, source: Source, name: str) -> Variant | None:
    """The built variant of `source` under the recipe called `name`."""
    if recipe := recipe_of(name):
        return store.find(variant_key(source, recipe))
    return next(
        (found for found in built_of(store.list(), source) if found.manifest.recipe.name == name), None
    )


def built_of(variants: Iterable[Variant], source: Source) -> list[Variant]:
    return [variant for variant in variants if variant.manifest.source.digest == source.digest]


def backend_for(model: Model, format_name: str) -> str:
    """Raises RequestError saying why nothing here, or not the backend that models.yaml names, can open it."""
    if model.backend != "auto":
        return registry.require(model.backend, format_name).name
    return registry.for_format(format_name).name
