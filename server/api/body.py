"""A JSON body becomes a checked request model, or a 400 that names the parameter."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import ValidationError

from server.api.errors import from_validation
from server.api.ignored import name_ignored
from server.api.schema.base import Body
from server.errors import RequestError, WrongContentType

B = TypeVar("B", bound=Body)


def json_body(model: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency. Dependencies run in order, so that nothing is read before the caller is authenticated."""

    async def read(request: Request) -> B:
        _require_json(request.headers.get("content-type", ""))
        _require_plain(request.headers.getlist("content-encoding"))
        body = parse(model, await request.body())
        name_ignored(request, body.ignored())
        return body

    read.model = model  # type: ignore[attr-defined]  # for the description of the route
    return read


def parse(model: type[B], raw: bytes) -> B:
    """Raises RequestError."""
    fields = _decode(raw)
    try:
        # null stands for the default, for every parameter
        body = model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise from_validation(error) from None
    body.sent_as(fields.keys())
    body.refuse_unsupported()
    return body


def _decode(raw: bytes) -> dict[str, Any]:
    """Strict JSON: no NaN, no bad UTF-8, no nesting beyond what the stack takes."""
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        where = str(error).rpartition("(byte ")[2].rstrip(")")
        at = f" at byte {where}" if where.isdigit() else ""
        raise RequestError(f"the body is not valid JSON{at}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def _require_plain(encodings: Iterable[str]) -> None:
    """A small body must not become a large one here."""
    codings = (coding.strip().lower() for encoding in encodings for coding in encoding.split(","))
    if any(coding not in ("", "identity") for coding in codings):
        raise WrongContentType("bodies must not be compressed: send JSON without a Content-Encoding")


def _require_json(content_type: str) -> None:
    kind, _, options = content_type.partition(";")
    if kind.strip().lower() != "application/json":
        raise WrongContentType("the Content-Type must be application/json")
    charset = options.strip().lower().removeprefix("charset=").strip('"')
    if charset not in ("", "utf-8", "utf8"):
        raise WrongContentType("JSON is sent as UTF-8")
