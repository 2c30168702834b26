"""Which methods there are: names and where they live. Listing them imports none of them."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

from quant.errors import BadRecipe

if TYPE_CHECKING:
    from quant.methods.base import Method

GROUP = "quantserve.methods"  # entry points of other packages
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rtn": "quant.methods.rtn:RTN",
        "awq": "quant.methods.awq:AWQ",
        "gptq": "quant.methods.gptq:GPTQ",
        "awq+gptq": "quant.methods.awq_gptq:AWQ_GPTQ",
        "best": "quant.methods.best:BEST",
        "smoothquant": "quant.methods.smoothquant:SMOOTHQUANT",
        "int8": "quant.methods.int8:INT8",
        "nf4": "quant.methods.blockwise:NF4",
        "fp4": "quant.methods.blockwise:FP4",
    }
)


def method_names() -> tuple[str, ...]:
    return tuple(sorted({*METHODS, *(entry.name for entry in entry_points(group=GROUP))}))


def load_method(name: str) -> "Method":
    """Raises BadRecipe for a name that nobody registered."""
    if target := METHODS.get(name):
        module, _, attribute = target.partition(":")
        method: Method = getattr(import_module(module), attribute)
        return method
    for entry in entry_points(group=GROUP, name=name):
        loaded: Method = entry.load()
        return loaded
    raise BadRecipe(f"method {name!r:.80} is not known (known: {', '.join(method_names())})")
