"""`quantserve quantize`: build one variant in a child process and watch it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.terminal import progress, stop

if TYPE_CHECKING:
    from quant.recipe import Recipe


def quantize(
    source: Annotated[str, typer.Argument(help="Folder, float GGUF file or hub id (org/name[@revision]).")],
    recipe: Annotated[str, typer.Option(help="A name such as q4_k_m, or a recipe as JSON.")] = "q4_k_m",
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix file.", exists=True)] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Build one variant of SOURCE, or find it built. Prints built or cached, id, key, path and size."""
    from server.catalog.source import read_reference
    from server.cli.building import Interrupted, run_builder
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache", "cache_max_bytes"), cache=cache)
    parsed = _read_recipe(recipe, imatrix)
    try:
        found = read_reference(source, Path.cwd())
    except ValueError as error:
        stop(str(error), code=2)
    name = f"{found.base_name}:{parsed.name}"
    try:
        with progress() as shown:
            answer = run_builder(settings, found, parsed, lambda step: shown.show(name, step))
    except Interrupted as interrupted:
        stop(_left_behind(settings.cache, interrupted.key), code=130)
    if answer.error or not (answer.key and answer.variant):
        stop(f"{name}: {answer.error.message if answer.error else 'the builder gave no answer'}")
    typer.echo(f"{answer.outcome} {name} {answer.key} {_described(Path(answer.variant))}")


def _read_recipe(text: str, imatrix: Path | None) -> "Recipe":
    """Raises BadRecipe."""
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


def _described(folder: Path) -> str:
    from quant.manifest import read_manifest

    manifest = read_manifest(folder)
    return f"{folder} {manifest.bytes / 1e6:.1f} MB {manifest.bits_per_weight:.2f} bits/weight"


def _left_behind(cache: Path, key: str | None) -> str:
    from quant.store import VariantStore

    left = next((one for one in VariantStore(cache).unfinished() if one.key == key), None)
    if left is None:
        return "interrupted; nothing was built yet"
    return (
        f"interrupted; {left.bytes / 1e6:.1f} MB stay in {cache / 'scratch' / left.key}, "
        "from which the same command goes on"
    )
