"""`quantserve pull`: fetch a source from the hub ahead of the first build."""

import os
from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import Step, progress, stop


def pull(
    source: Annotated[str, typer.Argument(metavar="ID[@REVISION]", help="Hub id, such as org/name@main.")],
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Download SOURCE's weights and tokenizer, and check them."""
    from quant.source import open_source
    from server.catalog.source import read_reference
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache",), cache=cache)
    try:
        found = read_reference(source, Path.cwd())
    except ValueError as error:
        stop(str(error), code=2)
    with progress() as shown:
        pulled = open_source(
            found.source,
            cache=settings.cache,
            revision=found.revision,
            progress=lambda at: shown.show(found.base_name, Step(at.stage, at.done, at.total, at.unit)),
        )
    revision = f"@{pulled.revision}" if pulled.revision else ""
    typer.echo(f"pulled {pulled.id}{revision} {pulled.path} {pulled.bytes / 1e6:.1f} MB")
