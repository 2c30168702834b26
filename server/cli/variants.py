"""`quantserve variants`: what the cache holds."""

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli.terminal import stop

if TYPE_CHECKING:
    from quant.store import Unfinished, VariantStore

app = typer.Typer(help="List, check and remove built variants.", no_args_is_help=True)
Cache = Annotated[str | None, typer.Option("--cache", help="Folder of built variants.", metavar="DIR")]
SHORTEST_KEY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing in the cache, as `ls --json` prints it."""

    state: Literal["built", "unfinished", "damaged", "quarantined"]
    key: str
    id: str | None = None  # source's base name and recipe; only a manifest knows them
    bytes: int | None = None
    bits_per_weight: float | None = None
    source: str | None = None
    revision: str | None = None
    format: str | None = None
    path: str | None = None
    last_used: float  # seconds since the epoch; for unfinished ones the last write


@app.command("ls")
def list_variants(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a JSON list.")] = False,
    cache: Cache = None,
) -> None:
    """List built variants, builds that were not finished, and damaged folders, those in quarantine too."""
    rows = rows_of(_store(cache))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        typer.echo(table(rows, time.time()))
    else:
        sys.stderr.write("no variants yet: quantserve quantize SOURCE builds one\n")


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="KEY|ID...", help="Key, its beginning, or an id.")],
    cache: Cache = None,
) -> None:
    """Remove variants, the rest of unfinished builds, and what is in quarantine from the cache."""
    store = _store(cache)
    rows = rows_of(store)
    for row in [one_of(rows, name) for name in names]:
        if row.state == "quarantined":
            store.clear_quarantine(row.key)
        elif row.state != "unfinished":
            store.delete(row.key)
            store.clear_quarantine(row.key)
        elif not store.discard_scratch(row.key):
            stop(f"{row.key} is being built right now")
        typer.echo(f"removed {row.id or row.state} {row.key}")


@app.command("verify")
def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="[KEY|ID]...", help="All without one.")] = None,
    cache: Cache = None,
) -> None:
    """Compare every file with the hash in its manifest. Exits 1 when one differs."""
    from quant.errors import DamagedVariant

    store = _store(cache)
    rows = [row for row in rows_of(store) if row.state in ("built", "damaged")]
    damaged = 0
    for row in [one_of(rows, name) for name in names] if names else rows:
        try:
            store.verify(row.key)
        except DamagedVariant as error:
            damaged += 1
            typer.echo(f"damaged {row.id or '-'} {row.key}: {error}")
        else:
            typer.echo(f"ok {row.id} {row.key}")
    if damaged:
        raise typer.Exit(1)


def rows_of(store: "VariantStore") -> list[Row]:
    """Least recently used first, then what is damaged or unfinished."""
    from server.catalog.source import base_name

    built = [
        Row(
            state="built",
            key=variant.key,
            id=f"{base_name(variant.manifest.source.id)}:{variant.manifest.recipe.name}",
            bytes=variant.manifest.bytes,
            bits_per_weight=variant.manifest.bits_per_weight,
            source=variant.manifest.source.id,
            revision=variant.manifest.source.revision,
            format=variant.manifest.format,
            path=str(variant.path),
            last_used=variant.last_used,
        )
        for variant in store.list()
    ]
    damaged = [Row(state="damaged", key=key, last_used=0.0) for key in store.damaged()]
    quarantined = [
        Row(state="quarantined", key=one.key, bytes=one.bytes, last_used=one.mtime)
        for one in store.quarantined()
    ]
    return built + damaged + quarantined + [_unfinished(store, one) for one in store.unfinished()]


def _unfinished(store: "VariantStore", one: "Unfinished") -> Row:
    path = str(store.scratch(one.key))
    return Row(state="unfinished", key=one.key, bytes=one.bytes, path=path, last_used=one.mtime)


def one_of(rows: list[Row], name: str) -> Row:
    """The row with this id, key or beginning of a key; ends the command where it is none or several."""
    is_key = len(name) >= SHORTEST_KEY and re.fullmatch("[0-9a-f]+", name)
    found = [row for row in rows if row.id == name or (is_key and row.key.startswith(name))]
    of_keys = {row.key: row for row in reversed(found)}  # of what has one key the first: what is built
    match list(of_keys.values()):
        case [row]:
            return row
        case []:
            stop(f"no variant {name!r}; `quantserve variants ls` shows what there is")
        case _:
            stop(f"{name!r} may be any of {', '.join(row.key for row in found)}: name the key")


def table(rows: list[Row], now: float) -> str:
    """Aligned columns, never wrapped or cut, so that other programs can read them too."""
    cells = [("ID", "KEY", "SIZE", "BITS", "USED"), *(_cells(row, now) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _cells(row: Row, now: float) -> tuple[str, str, str, str, str]:
    size = "-" if row.bytes is None else f"{row.bytes / 1e6:.1f} MB"
    bits = "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
    used = ago(now - row.last_used) if row.last_used else "-"
    return row.id or f"({row.state})", row.key, size, bits, used


def ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _store(cache: str | None) -> "VariantStore":
    from quant.store import VariantStore
    from server.settings import read_settings

    return VariantStore(read_settings(os.environ, ("cache",), cache=cache).cache)
