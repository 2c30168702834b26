"""`quantserve measure` and `quantserve report`: how far variants are from their source."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.recipes import read_recipe
from server.cli.terminal import progress, stop

if TYPE_CHECKING:
    from quant.measure.report import Judged
    from quant.recipe import Recipe
    from server.catalog import Model
    from server.settings import Settings

# One of each kind that is worth knowing, from large to small within a family.
EVERY = (
    *("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q4_0", "q3_k_m", "iq3_s", "q2_k"),
    *("int8", "nf4", "w8a8", "w4a16", "awq-w4g128", "gptq-w4g128"),
)
Specs = Annotated[
    list[str],
    typer.Argument(help="model or model:variant of models.yaml, or a source (folder, .gguf file, hub id)."),
]
Variants = Annotated[
    str | None,
    typer.Option(help="Recipes, with commas between them, for names without one.", metavar="NAMES"),
]
Cache = Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")]


def measure(  # noqa: PLR0913, PLR0917  a command has as many parameters as options
    specs: Specs,
    variants: Variants = None,
    recipe: Annotated[
        str | None, typer.Option(help="One more variant, by a recipe as JSON.", metavar="JSON")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"These variants: {' '.join(EVERY)}.")] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(help="A text to measure on, instead of the source's own answers.", exists=True),
    ] = None,
    texts: Annotated[int | None, typer.Option(help="Exactly so many texts.", min=2, metavar="N")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for each variant's distances [120].", min=1, metavar="S")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what is measured already.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page and a JSON file for each variant there.", metavar="DIR")
    ] = None,
    context: Annotated[int | None, typer.Option("--ctx", help="Tokens of one request.", min=64)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engines.", min=1)] = None,
    cache: Cache = None,
) -> None:
    """Build what is missing, measure it through its engine, judge it, and print a table.

    Exit 1 where a variant could not be built or measured; rejected ones are no failure.
    """
    from server.cli.measuring import Job, Wanted, run

    settings = _settings(cache)
    wanted = Wanted(
        corpus=str(corpus.absolute()) if corpus else None,
        texts=texts,
        budget_s=budget or 120.0,
        again=again,
        context=context,
        threads=threads,
    )
    named = Named(
        tuple(name for name in (variants or "").split(",") if name),
        (read_recipe(recipe),) if recipe else (),
        every,
    )
    jobs = [Job(model, recipe) for spec in specs for model, recipe in _asked(settings, spec, named)]
    with progress() as shown:
        problems = ((job.id, run(settings, job, wanted, shown)) for job in jobs)
        failed = [f"{id}: {problem}" for id, problem in problems if problem]
    for model in dict.fromkeys(job.model for job in jobs):
        found = _judged(settings, model)
        _print(model, found)
        if report is not None:
            _write(report, model, found)
    if failed:
        stop(*failed)


def report(
    spec: Annotated[str, typer.Argument(help="model or model:variant of models.yaml, or a source.")],
    out: Annotated[Path, typer.Option(help="Folder for the pages.", metavar="DIR")] = Path("reports"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, write nothing.")] = False,
    cache: Cache = None,
) -> None:
    """Write a page (HTML) and a JSON file for each measured variant, or for the one that is named."""
    from quant.measure.report import as_json as encoded
    from quant.measure.report import report_of

    settings = _settings(cache)
    model, names = _model(settings, spec)
    found = _judged(settings, model)
    wanted = [one for one in found if (one.measurement or names) and (not names or one.name in names)]
    if not wanted:
        stop(f"nothing is known of {spec}; measure it first: quantserve measure {spec}")
    if as_json:
        for one in wanted:
            sys.stdout.write(encoded(report_of(model.id, one, found, model.source)).decode())
        return
    _write(out, model, found, wanted)


def _settings(cache: str | None) -> "Settings":
    from server.settings import read_settings

    return read_settings(os.environ, ("cache", "models", "cache_max_bytes", "default_context"), cache=cache)


@dataclass(frozen=True, slots=True)
class Named:
    """What options name, for specs that name no variants."""

    variants: tuple[str, ...]
    recipes: tuple["Recipe", ...]
    every: bool


def _asked(settings: "Settings", spec: str, options: Named) -> Iterator[tuple["Model", "Recipe"]]:
    """Raises BadRecipe."""
    model, named = _model(settings, spec)
    names = named or options.variants or (EVERY if options.every else ())
    if model.is_ready and not (names or options.recipes):
        stop(f"{model.id} is served as it is ({model.default}); name variants to make of it and measure")
    names = names or (() if options.recipes else model.variants)
    recipes = [_recipe(settings, model, name) for name in names]
    for recipe in dict.fromkeys((*recipes, *options.recipes)):
        yield model, recipe


def _recipe(settings: "Settings", model: "Model", name: str) -> "Recipe":
    """Raises BadRecipe. Of custom ones the name is a digest, which only the manifest of one explains."""
    from quant.recipe import parse_recipe

    if name.startswith("custom-"):
        for one in _judged(settings, model):
            if one.name == name:
                return parse_recipe(one.variant.manifest.recipe.body)
        stop(f"no variant {name} of {model.id} is built; name its recipe: --recipe JSON")
    return parse_recipe(name)


def _model(settings: "Settings", spec: str) -> tuple["Model", tuple[str, ...]]:
    """A model of models.yaml, or one made of a source; and the variants that stand behind a colon."""
    from server.catalog import CatalogError, load_catalog, model_from_source

    stem, _, names = spec.partition(":")
    variants = tuple(name for name in names.split(",") if name)
    try:
        listed = load_catalog(settings.models).models if settings.models.is_file() else ()
        for model in listed:
            if stem in model.names and not Path(stem).exists():
                return model, variants
        return model_from_source(stem), variants
    except CatalogError as error:
        stop(*error.problems, code=2)


def _judged(settings: "Settings", model: "Model") -> list["Judged"]:
    """Every built variant of the model's source, coarsest last."""
    from quant.measure.report import judged
    from quant.source import open_source
    from quant.store import VariantStore

    source = open_source(model.source, cache=settings.cache, revision=model.revision, local_only=True)
    variants = [
        variant
        for variant in VariantStore(settings.cache).list()
        if variant.manifest.source.digest == source.digest
    ]
    found = [judged(variant, model.gate.of(variant.manifest.recipe.name)) for variant in variants]
    return sorted(found, key=lambda one: (-one.variant.manifest.bits_per_weight, one.name))


def _print(model: "Model", found: Sequence["Judged"]) -> None:
    head = ("variant", "state", "bits/w", "MB", "mean KL", "99 %", "top-1", "ln PPL", "tok/s 1/8")
    typer.echo(model.id)
    rows = [head, *(_row(one) for one in found if one.measurement)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for one in found:
        for reason in one.verdict.reasons:
            typer.echo(f"{one.name} is {one.verdict.state}: {reason}")


def _row(one: "Judged") -> tuple[str, ...]:
    found = one.measurement
    assert found is not None
    speed = found.speed
    return (
        one.name,
        one.verdict.state,
        f"{found.bits_per_weight:.2f}",
        f"{found.bytes / 1e6:.1f}",
        str(found.kl.mean),
        f"{found.kl.p99.value:.3f}",
        found.top1.percent,
        f"{found.ln_ppl_change.value:+.4f}",
        f"{speed.decode_1:.0f}/{speed.decode_8:.0f}" if speed else "",
    )


def _write(
    folder: Path, model: "Model", found: Sequence["Judged"], wanted: Sequence["Judged"] | None = None
) -> None:
    from quant.measure.report import report_of, write_report

    for one in wanted or [one for one in found if one.measurement]:
        typer.echo(write_report(folder, report_of(model.id, one, found, model.source), found))
