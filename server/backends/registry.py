"""Name -> backend. Strings, so that listing costs no import of torch or llama_cpp.

A package of its own adds a backend through the entry point group `quantserve.backends`.
"""

import logging
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from server.backends.base import Backend
from server.errors import RequestError

logger = logging.getLogger(__name__)

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
    """Raises RequestError for an unknown name, with the known ones, and for a package that is broken."""
    if spec := BUILTIN.get(name):
        module, _, attribute = spec.partition(":")
        backend: Backend = getattr(import_module(module), attribute)
        return backend
    for point in entry_points(group=GROUP, name=name):
        return _plugin(point)
    raise RequestError(f"no backend {name!r}; known: {', '.join(names())}")


def device_of(backend: Backend) -> str:
    """What it cannot do without; "cpu" of those that run anywhere, as all of ours."""
    return str(getattr(backend, "device", "cpu"))


def _plugin(point: EntryPoint) -> Backend:
    """Raises RequestError, whatever that package's code raises: it must not take the others along."""
    try:
        found: Backend = point.load()
    except Exception as error:
        logger.warning("backend %r cannot be loaded: %r", point.name, error)
        raise RequestError(f"backend {point.name!r} cannot be loaded: {type(error).__name__}") from error
    return found


def require(name: str, format_name: str) -> Backend:
    """The backend of that name. Raises RequestError where it does not open the format, or cannot run here."""
    backend = load(name)
    if format_name not in backend.formats and not getattr(backend, "opens_any", False):
        opens = ", ".join(sorted(backend.formats))
        raise RequestError(f"backend {name!r} does not open format {format_name!r}; it opens {opens}")
    if (reason := backend.probe()) is not None:
        raise RequestError(f"{name}: {reason}")
    return backend


def for_format(format_name: str) -> Backend:
    """The first backend that opens this format and can run here. Raises RequestError saying why none can."""
    reasons = []
    for name in names():
        try:
            backend = load(name)
        except RequestError as error:
            reasons.append(str(error))
            continue
        if format_name not in backend.formats:
            continue
        if (reason := backend.probe()) is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise RequestError(
        f"no backend can open format {format_name!r} here ({'; '.join(reasons) or 'none knows it'})"
    )
