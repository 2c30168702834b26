"""Name -> backend. Strings, so that listing costs no import of torch or llama_cpp.

A package of its own adds a backend through the entry point group `quantserve.backends`.
"""

from importlib import import_module
from importlib.metadata import entry_points

from server.backends.base import Backend
from server.errors import RequestError

GROUP = "quantserve.backends"

BUILTIN = {
    "llama": "server.backends.llama.backend:LLAMA",
    "plain": "server.backends.torch_.backend:PLAIN",
    "bitsandbytes": "server.backends.torch_.backend:BITSANDBYTES",
    "awq": "server.backends.torch_.backend:AWQ",
    "gptq": "server.backends.torch_.backend:GPTQ",
    "compressed": "server.backends.torch_.backend:COMPRESSED",
    "toy-rows": "server.backends.toy:ROWS",
    "toy-pages": "server.backends.toy:PAGES",
}


def names() -> list[str]:
    return sorted({*BUILTIN, *(point.name for point in entry_points(group=GROUP))})


def load(name: str) -> Backend:
    """Raises RequestError for an unknown name, with the known ones."""
    if spec := BUILTIN.get(name):
        module, _, attribute = spec.partition(":")
        backend: Backend = getattr(import_module(module), attribute)
        return backend
    for point in entry_points(group=GROUP, name=name):
        found: Backend = point.load()
        return found
    raise RequestError(f"no backend {name!r}; known: {', '.join(names())}")


def for_format(format_name: str) -> Backend:
    """The first backend that opens this format and can run here. Raises RequestError saying why none can."""
    reasons = []
    for name in names():
        backend = load(name)
        if format_name not in backend.formats:
            continue
        if (reason := backend.probe()) is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise RequestError(
        f"no backend can open format {format_name!r} here ({'; '.join(reasons) or 'none knows it'})"
    )
