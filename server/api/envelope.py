"""How an error is written: in OpenAI's shape, or on Anthropic's routes in theirs."""

from collections.abc import Mapping
from contextvars import ContextVar

import msgspec
from msgspec import Struct

from server.errors import ServerError

# Of the request that this task answers: for those who count.
refused_with: ContextVar[str | None] = ContextVar("refused_with", default=None)

MESSAGES = "/v1/messages"
KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
}


class Detail(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True, kw_only=True):
    error: Detail


class MessagesDetail(Struct, frozen=True, kw_only=True):
    type: str
    message: str


class MessagesError(Struct, frozen=True, kw_only=True):
    type: str = "error"
    error: MessagesDetail


def is_messages(path: str) -> bool:
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def body_of(error: ServerError, path: str = "") -> bytes:
    """As the route at `path` writes errors."""
    refused_with.set(error.code)
    if is_messages(path):
        return msgspec.json.encode(messages_error(error))
    detail = Detail(message=str(error), type=error.kind, param=error.param, code=error.code)
    return msgspec.json.encode(ErrorBody(error=detail))


def messages_error(error: ServerError) -> MessagesError:
    """The message names the parameter; the status chooses among Anthropic's types."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    return MessagesError(error=MessagesDetail(type=KINDS.get(error.status, usual), message=str(error)))
