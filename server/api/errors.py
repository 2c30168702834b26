"""One error shape a route (server.api.envelope), whatever went wrong and wherever."""

import logging
import re
import traceback
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from quant.errors import (
    BadRecipe,
    BadSource,
    Cancelled,
    DiskFull,
    QuantError,
    UnknownVariant,
    VariantInUse,
)
from server import errors
from server.api.envelope import body_of
from server.api.schema.base import field_names
from server.errors import MethodNotAllowed, NotFound, RequestError, ServerError

log = logging.getLogger(__name__)

FRAMES_LOGGED = 8  # of an unexpected exception; its message might hold a prompt and is not logged
CLIENT_GONE = 499  # nobody reads it: the client has left
PARAM = re.compile(r"(?:Value error, )?(?P<param>[a-z_]+): ")

QUANT_ERRORS: Mapping[type[QuantError], type[ServerError]] = {
    BadRecipe: RequestError,
    BadSource: RequestError,
    UnknownVariant: NotFound,
    VariantInUse: errors.Conflict,
    Cancelled: errors.Conflict,
    DiskFull: errors.DiskFull,
}


class ClientGone(Exception):
    """The client left before its answer was complete."""


def response_of(error: ServerError, path: str = "", headers: Mapping[str, str] | None = None) -> Response:
    every = dict(headers or {})
    if error.retry_after is not None:
        every["Retry-After"] = str(error.retry_after)
    return Response(body_of(error, path), error.status, every, "application/json")


def unexpected(error: BaseException) -> ServerError:
    """What a client is told of a mistake of ours; where it happened goes to the log, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES_LOGGED:]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    log.error("unexpected %s at %s", type(error).__name__, where)
    return ServerError("something went wrong inside the server")


def from_quant(error: QuantError) -> ServerError:
    known = next((ours for theirs, ours in QUANT_ERRORS.items() if isinstance(error, theirs)), ServerError)
    return known(str(error), param="recipe" if isinstance(error, BadRecipe) else None)


def from_validation(error: ValidationError) -> RequestError:
    """The most specific complaint, with the parameter and the bound, and never the value."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(details, key=lambda detail: len(detail["loc"]))
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        text = "is none of the known kinds"
    param = _path(first["loc"])
    if param is None:
        named = PARAM.match(text)
        return RequestError(text, param=named["param"] if named else None)
    return RequestError(f"{param}: {text[:1].lower()}{text[1:]}", param=param)


def _path(loc: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content") -> "messages[0].content"; pydantic's names of union members are left out,
    and so is every name that is no parameter's: a client chose it."""
    path = ""
    for part in loc[:-2] if loc[-1:] == ("[key]",) else loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in field_names():
            path += f".{part}" if path else part
    return path or None


def from_http(error: HTTPException) -> ServerError:
    match error.status_code:
        case 404:
            return NotFound("there is no such route")
        case 405:
            return MethodNotAllowed("this route does not take this method")
        case status if status < 500:
            return RequestError("the request could not be read")
        case _:
            return ServerError("something went wrong inside the server")


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return response_of(error, request.scope["path"])


async def _on_quant_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuantError)
    return response_of(from_quant(error), request.scope["path"])


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return response_of(from_http(error), request.scope["path"], headers)


def _allowed(request: Request) -> str:
    """Methods of every route at this path; the exception knows those of the first one only."""
    routers: tuple[APIRouter, ...] = request.app.state.routers
    methods: set[str] = set()
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, APIRoute) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


async def _on_client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def install_error_handlers(app: FastAPI) -> None:
    """Unexpected exceptions are caught by `Edge`, around the whole application."""
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(QuantError, _on_quant_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
