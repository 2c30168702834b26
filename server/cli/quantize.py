"""`quantserve quantize`: build one variant in a child process and watch it."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.recipes import read_recipe
from server.cli.terminal import progress, stop

if TYPE_CHECKING:
    from quant.recipe import Recipe
    from server.catalog.source import Reference
    from server.settings import Settings


def quantize(  # noqa: PLR0913, PLR0917  a command has as many parameters as options
    source: Annotated[str, typer.Argument(help="Folder, float GGUF file or hub id (org/name[@revision]).")],
    recipe: Annotated[
        str, typer.Option(help="A name such as q4_k_m or gptq-w4g128, or a recipe as JSON.")
    ] = "q4_k_m",
    target: Annotated[
        str | None,
        typer.Option(
            help="Instead of a recipe: max_kl=0.02, max_bytes=4000000000 or target_bpw=4.5; what meets it "
            "is searched, built and measured.",
            metavar="LIMIT",
        ),
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix file.", exists=True)] = None,
    device: Annotated[str, typer.Option(help="Where torch formats are made: auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of a search's engines.", min=1)] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Build one variant of SOURCE, or find it built. Prints built or cached, id, key, path and size."""
    from server.catalog.source import read_reference
    from server.cli.serve import cannot_cache
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache", "cache_max_bytes", "default_context"), cache=cache)
    if not settings.cache.exists() and not dry_run and (problem := cannot_cache(settings.cache)):
        stop(problem)
    if target is not None:
        _search(settings, source, target, threads)
        return
    parsed = read_recipe(recipe, imatrix)
    if device not in {"auto", "cpu", "cuda"}:
        stop(f"--device is auto, cpu or cuda, not {device!r:.40}", code=2)
    try:
        found = read_reference(source, Path.cwd())
    except ValueError as error:
        stop(str(error), code=2)
    name = f"{found.base_name}:{parsed.name}"
    if dry_run:
        _show_plan(settings.cache, name, found, parsed, device)
    else:
        _build(settings, name, found, parsed, device)


def _search(settings: "Settings", source: str, target: str, threads: int | None) -> None:
    """Prints every try, the winner and why it won; exit 1 where none meets the target. Raises BadRecipe."""
    from quant.search.found import lines_of
    from server.catalog import CatalogError, model_from_source
    from server.cli.searching import read_target, run_search

    try:
        model = model_from_source(source)
    except CatalogError as error:
        stop(*error.problems, code=2)
    with progress() as shown:
        found = run_search(settings, model, read_target(target), threads, shown)
    for line in lines_of(found):
        typer.echo(line)
    if found.winner is None:
        raise typer.Exit(1)
    folder = settings.cache / "variants" / found.winner.key
    typer.echo(f"built {model.id}:{found.winner.variant} {found.winner.key} {_described(folder)}")


def _show_plan(cache: Path, name: str, found: "Reference", recipe: "Recipe", device: str) -> None:
    """Raises BadSource, BadRecipe for what cannot be built."""
    from quant.build_plan import plan_build
    from quant.plan import require_buildable
    from quant.source import open_source
    from server.cli.plans import plan_lines

    source = open_source(
        found.source,
        cache=cache,
        revision=found.revision,
        check=lambda source: require_buildable(source, recipe),
    )
    for line in plan_lines(name, plan_build(source, recipe, device=device)):
        typer.echo(line)


def _build(settings: "Settings", name: str, found: "Reference", recipe: "Recipe", device: str) -> None:
    from server.cli.building import Interrupted, run_builder

    try:
        with progress() as shown:
            answer = run_builder(
                settings,
                found,
                recipe,
                lambda step: shown.show(name, step),
                say=lambda note: shown.say(f"{name}: {note}"),
                device=device,
            )
    except Interrupted as interrupted:
        stop(_left_behind(settings.cache, interrupted.key), code=130)
    if answer.error or not (answer.key and answer.variant):
        stop(f"{name}: {answer.error.message if answer.error else 'the builder gave no answer'}")
    folder = Path(answer.variant)
    if answer.outcome == "built" and (summary := _summary(folder)):
        sys.stderr.write(f"{name}: {summary}\n")
    typer.echo(f"{answer.outcome} {name} {answer.key} {_described(folder)}")


def _summary(folder: Path) -> str | None:
    """How the modules of a torch format went."""
    try:
        modules = json.loads((folder / "quantization.json").read_bytes())["modules"]
    except (OSError, ValueError, KeyError):
        return None
    losses = [(one["loss"], one["rtn_loss"]) for one in modules if one["loss"] and one["rtn_loss"]]
    shares = sorted(loss / rtn for loss, rtn in losses)
    error = f", output error {shares[len(shares) // 2]:.2f} of round-to-nearest's (median)" if shares else ""
    fallen = sum(one["fallback"] is not None for one in modules)
    return f"{len(modules)} modules{error}" + (f", {fallen} fell back" if fallen else "")


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
