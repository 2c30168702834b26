"""X-Ignored-Params: the names of what a request brought and nothing reads."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import quote

from fastapi import Request

from server.api.edge import trace_of

NAMES_SHOWN = 20  # in the header
NAME_CHARS = 64
READ: Mapping[str, frozenset[str]] = MappingProxyType({"/v1/responses/{id}": frozenset(("stream",))})


def name_ignored(request: Request, names: Sequence[str]) -> None:
    """Adds them to those that are named already."""
    trace = trace_of(request.scope)
    trace.ignored += [name for name in dict.fromkeys(names) if name not in trace.ignored]
    if trace.ignored:
        trace.headers["x-ignored-params"] = header_value(trace.ignored)


def name_query(request: Request) -> None:
    """A dependency of every route: requests are made of their path and body, not of what follows a `?`."""
    read = READ.get(getattr(request.scope.get("route"), "path", ""), frozenset())
    name_ignored(request, [f"query.{name}" for name in request.query_params if name not in read])


def header_value(names: Sequence[str]) -> str:
    """A client chose these names, so they are escaped and cut."""
    shown = [quote(name[:NAME_CHARS], safe=".-_") for name in names[:NAMES_SHOWN]]
    return ", ".join([*shown, "..."] if len(names) > NAMES_SHOWN else shown)
