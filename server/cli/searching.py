"""A search as the command line runs it: the same process as a job's, watched."""

from functools import partial

import msgspec
from msgspec.structs import replace

from quant.errors import BadRecipe
from quant.search.found import Found
from quant.search.target import Target, parse_target
from server.catalog import Model
from server.cli.running import run_module
from server.cli.terminal import Progress, stop
from server.pool.searches import search_order
from server.settings import Settings


def read_target(text: str) -> Target:
    """ "max_kl=0.02", or "max_kl=0.02,format=compressed-tensors". Raises BadRecipe."""
    fields: dict[str, object] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            fields[name] = value if name == "format" else float(value)
        except ValueError as error:
            raise BadRecipe("a target is a name and a number, as in max_kl=0.02") from error
    return parse_target(fields)


def run_search(
    settings: Settings, model: Model, target: Target, threads: int | None, shown: Progress
) -> Found:
    """Ends the command where the search fails."""
    order = search_order(settings, replace(model, threads=threads or model.threads), target)
    answer = run_module(
        "server.process.searcher",
        ("--order", msgspec.json.encode(order).decode()),
        partial(shown.show, model.id),
        say=shown.say,
        interrupted="interrupted; the same command goes on",
    )
    if isinstance(answer, str):
        stop(answer)
    if answer.error or answer.found is None:
        stop(answer.error.message if answer.error else "the search gave no answer")
    return answer.found
