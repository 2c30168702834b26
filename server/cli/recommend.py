"""`quantserve recommend`: which presets fit, in which order, and why."""

import os
import re
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.terminal import stop

if TYPE_CHECKING:
    from quant.recommend import Advice, Need, Option

UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


def recommend(
    source: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id (org/name[@revision]).")],
    memory: Annotated[str, typer.Option(help="Of the device: 8GiB, 24GB.")] = "8GiB",
    context: Annotated[int | None, typer.Option(help="Tokens of one request [the model's].", min=1)] = None,
    parallel: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 1,
    task: Annotated[str, typer.Option(help="chat, code, extract or draft.")] = "chat",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[str | None, typer.Option(help="Folder of built variants.", metavar="DIR")] = None,
) -> None:
    """Presets of SOURCE that fit, best first, with the arithmetic: weights + KV memory + overhead."""
    from quant.recommend import Need
    from quant.recommend import recommend as advice_for
    from quant.source import open_source
    from quant.torch_plan import likely_device
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache",), cache=cache)
    where = likely_device() if device == "auto" else device
    need = Need(memory=_bytes(memory), context=context, parallel=parallel, task=task, device=where)
    advice = advice_for(open_source(source, cache=settings.cache), need)
    typer.echo(_headline(advice, need))
    for place, option in enumerate(advice.options, 1):
        typer.echo(_line(place, option, need))
    for preset, why in advice.refused.items():
        typer.echo(f"-  {preset}: {why}")
    _say_fallbacks(advice)


def _headline(advice: "Advice", need: "Need") -> str:
    tokens = f"{need.context or advice.facts.context:,} tokens x {need.parallel}"
    room = f"{need.memory / 2**30:.2f} GiB of {need.device}"
    return f"{advice.facts.parameters:,} parameters; {tokens} in {room} for {need.task}; MB:"


def _line(place: int, option: "Option", need: "Need") -> str:
    parts = (
        f"codes {_mb(option.codes)} + scales {_mb(option.scales)} + kept {_mb(option.kept)} "
        f"+ KV {_mb(option.kv)} + overhead {_mb(option.overhead)} = {_mb(option.total)}"
    )
    close = "" if option.near_enough(need) else " [coarse for this task]"
    verdict = close if option.fits(need) else " [too large]"
    return f"{place}. {option.preset:11} {parts}; KL {option.loss:.4f}; to build: {option.build}{verdict}"


def _say_fallbacks(advice: "Advice") -> None:
    fallen = {option.preset: option.fallen_back for option in advice.options if option.fallen_back}
    if fallen:
        named = ", ".join(f"{preset} {count}" for preset, count in fallen.items())
        typer.echo(
            f"Rows that are no multiple of 256 fall back to larger types ({named} of "
            f"{len(advice.facts.weights)} matrices): they are larger and slower than "
            "their names say. Of 4 bits prefer q4_0."
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        stop(f"{text[:40]!r} is no amount of memory; write 8GiB or 24GB", code=2)
    return int(float(match[1]) * unit)
