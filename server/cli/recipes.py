"""Recipes as they are named on a command line."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.recipe import Recipe


def read_recipe(text: str, imatrix: Path | None = None) -> "Recipe":
    """A name, or JSON. Raises BadRecipe."""
    from quant.errors import BadRecipe
    from quant.recipe import parse_recipe

    spec: Any = {"type": text} if imatrix else text
    if text.lstrip().startswith("{"):
        try:
            spec = json.loads(text)
        except ValueError as error:
            raise BadRecipe(f"the recipe is no JSON: {error}") from error
    if imatrix:
        spec["imatrix"] = str(imatrix.absolute())
    return parse_recipe(spec, local=True)
