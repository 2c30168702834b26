"""`quantserve promote` and `rollback`: which variant of a running server answers to a model's bare name."""

import os
from typing import Annotated
from urllib.parse import quote

import typer

from server.cli.terminal import stop

Url = Annotated[str | None, typer.Option(help="The server.", metavar="URL")]


def promote(
    variant: Annotated[str, typer.Argument(help="model:variant")],
    url: Url = None,
) -> None:
    """Let a variant answer to its model's bare name, once it is built, measured, allowed and loaded."""
    _ask(variant, "promote", url)


def rollback(
    model: Annotated[str, typer.Argument(help="A model of the server.")],
    url: Url = None,
) -> None:
    """Let the variant answer again that did before the last promotion."""
    _ask(model, "rollback", url)


def _ask(variant: str, verb: str, url: str | None) -> None:
    from server.cli.chat import local_url
    from server.cli.client import ChatClient, Refused, Unreachable

    client = ChatClient(url or local_url(), os.environ.get("QUANTSERVE_API_KEY"))
    try:
        answer = client.post(f"/admin/variants/{quote(variant, safe=':')}/{verb}")
    except (Refused, Unreachable) as error:
        stop(str(error))
    now = f"{answer['variant']} ({answer['label']}) answers to {answer['model']}"
    typer.echo(f"{now}; before it was {answer['before']}")
