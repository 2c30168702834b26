"""`quantserve pull`: fetch a source from the hub ahead of the first build."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.terminal import Step, progress, stop

if TYPE_CHECKING:
    from quant.progress import Progress, Report
    from server.catalog.source import Reference


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ID[@REVISION]", help="Hub id, such as org/name@main; org/name:Q4_K_M for a GGUF file."
        ),
    ],
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Take the texts and what matches, instead of the safetensors."),
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Download SOURCE's weights and tokenizer, and check them. What was interrupted goes on where it was."""
    from quant.source import open_source
    from server.catalog.source import read_reference
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache",), cache=cache)
    try:
        found = read_reference(source, Path.cwd())
    except ValueError as error:
        stop(str(error), code=2)
    with progress() as shown:

        def report(at: "Progress") -> None:
            shown.show(found.base_name, Step(at.stage, at.done, at.total, at.unit))

        if include:
            typer.echo(f"pulled {_some(found, tuple(include), report)}")
            return
        pulled = open_source(found.source, cache=settings.cache, revision=found.revision, progress=report)
    revision = f"@{pulled.revision}" if pulled.revision else ""
    typer.echo(f"pulled {pulled.id}{revision} {pulled.path} {pulled.bytes / 1e6:.1f} MB")


def _some(found: "Reference", include: tuple[str, ...], report: "Report") -> Path:
    from quant.hub import Hub, parse_hub_id

    wanted = parse_hub_id(found.source, found.revision)
    if wanted is None or wanted.type:
        stop("--include goes with a hub id that names no type", code=2)
    return Hub().snapshot(wanted, local_only=False, report=report, include=include)
