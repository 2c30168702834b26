"""Name -> format of the torch backend. Strings, so that listing costs no import of torch.

A package of its own adds a format through the entry point group `quantserve.formats`.
"""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from quant.errors import BadRecipe

if TYPE_CHECKING:
    from quant.formats.base import Format

GROUP = "quantserve.formats"

BUILTIN = {
    "awq": "quant.formats.awq:AWQ",
    "bnb4": "quant.formats.bnb4:BNB4",
    "bnb8": "quant.formats.bnb8:BNB8",
    "compressed-tensors": "quant.formats.pack_quantized:PACK_QUANTIZED",
    "compressed-tensors-int8": "quant.formats.int_quantized:INT_QUANTIZED",
    "gptq": "quant.formats.gptq:GPTQ",
    "gptq-v2": "quant.formats.gptq:GPTQ_V2",
}


def names() -> list[str]:
    return sorted({*BUILTIN, *(point.name for point in entry_points(group=GROUP))})


def load(name: str) -> "Format":
    """Imports torch. Raises BadRecipe for an unknown name, with the known ones, and without torch."""
    try:
        if spec := BUILTIN.get(name):
            module, _, attribute = spec.partition(":")
            found: Format = getattr(import_module(module), attribute)
            return found
        for point in entry_points(group=GROUP, name=name):
            added: Format = point.load()
            return added
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BadRecipe(f"format {name!r} needs torch, which is not installed") from error
    raise BadRecipe(f"no format {name!r}; known: {', '.join(names())}")
