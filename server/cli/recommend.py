"""`quantserve recommend`: which presets fit, in which order, and why."""

import os
import re
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.terminal import stop

if TYPE_CHECKING:
    from quant.recommend import Facts, Option

UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


def recommend(
    source: Annotated[str, typer.Argument(help="Folder or hub id (org/name[@revision]).")],
    memory: Annotated[str, typer.Option(help="Of the device: 8GiB, 24GB.")] = "8GiB",
    context: Annotated[int | None, typer.Option(help="Tokens of one request [the model's].", min=1)] = None,
    parallel: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 1,
    task: Annotated[str, typer.Option(help="chat, code, extract or draft.")] = "chat",
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Presets of SOURCE that fit, best first, with the arithmetic: weights + KV memory + overhead."""
    from quant.recommend import Need, read_facts
    from quant.recommend import recommend as options_of
    from quant.source import open_source
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache",), cache=cache)
    room = _bytes(memory)
    facts = read_facts(open_source(source, cache=settings.cache))
    need = Need(memory=room, context=context or facts.context, parallel=parallel, task=task)
    options = options_of(facts, need)
    typer.echo(
        f"{facts.parameters:,} parameters; {need.context:,} tokens x {parallel} "
        f"in {room / 2**30:.2f} GiB for {task}"
    )
    for place, option in enumerate(options, 1):
        typer.echo(_line(place, option))
    _say_fallbacks(facts, options)


def _line(place: int, option: "Option") -> str:
    verdict = "too large" if not option.fits else "" if option.near_enough else "coarse for this task"
    parts = (
        f"codes {_mb(option.codes)} + scales {_mb(option.scales)} + vectors {_mb(option.vectors)} "
        f"+ KV {_mb(option.kv)} + overhead {_mb(option.overhead)} = {_mb(option.total)} MB"
    )
    return f"{place}. {option.preset:7} {parts}; {option.build}{f' [{verdict}]' if verdict else ''}"


def _say_fallbacks(facts: "Facts", options: "tuple[Option, ...]") -> None:
    fallen = {option.preset: option.fallen_back for option in options if option.fallen_back}
    if fallen:
        named = ", ".join(f"{preset} {count}" for preset, count in fallen.items())
        typer.echo(
            f"Rows that are no multiple of 256 fall back to larger types ({named} of {len(facts.weights)} "
            "matrices): they are larger and slower than their names say. Of 4 bits prefer q4_0."
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        stop(f"{text[:40]!r} is no amount of memory; write 8GiB or 24GB", code=2)
    return int(float(match[1]) * unit)
