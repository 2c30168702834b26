"""Every way a request can fail, once: status, type and code. Formatted in server/api/errors.py."""

from typing import ClassVar


class ServerError(Exception):
    """Root. `str(error)` is one line that a client may read: no path, no input echo, no traceback."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after  # seconds, for 429 and 503


class RequestError(ServerError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(RequestError):
    """A defined parameter that this model or backend cannot honour: never dropped in silence."""

    code = "unsupported_parameter"


class ContextTooLong(RequestError):
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    status = 403
    kind = "permission_error"
    code = "admin_key_required"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class UnknownResponse(NotFound):
    code = "response_not_found"


class PreviousResponseNotFound(RequestError):
    code = "previous_response_not_found"


class UnknownJob(NotFound):
    code = "job_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The client's own `timeout`, or its body took too long to arrive."""

    status = 408
    kind = "timeout_error"
    code = "timeout"


class Conflict(RequestError):
    status = 409
    code = "conflict"


class VariantRejected(Conflict):
    """The gate keeps it from being served; the message has the figures."""

    code = "variant_rejected"


class BodyTooLarge(RequestError):
    status = 413
    code = "body_too_large"


class WrongContentType(RequestError):
    status = 415
    code = "unsupported_media_type"


class RateLimited(RequestError):
    """One key asks for too much; others are answered."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class WrongHost(RequestError):
    code = "invalid_host"


class HeadersTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class Overloaded(ServerError):
    status = 503
    kind = "overloaded_error"
    code = "overloaded"


class ModelLoading(Overloaded):
    """The model is being built or loaded; the message names the job where there is one."""

    code = "model_loading"


class ModelUnavailable(Overloaded):
    """The model cannot be served now (quarantined, failed build); the message says why."""

    code = "model_unavailable"


class MemoryBusy(Overloaded):
    """The model's engine does not fit beside those that are in use; others may have gone soon."""

    code = "memory_busy"


class ShuttingDown(Overloaded):
    code = "shutting_down"


class DiskFull(ServerError):
    status = 507
    kind = "server_error"
    code = "disk_full"


class EngineFailed(ServerError):
    """A step went wrong inside the engine, which goes on."""

    code = "engine_failed"


class EngineDied(ServerError):
    """The engine's process ended while it held this request."""

    code = "engine_died"


class OpenError(ServerError):
    """A variant could not be opened by its backend."""

    code = "open_failed"


CROSSING = {
    cls.code: cls
    for cls in (
        RequestError,
        UnsupportedParameter,
        ContextTooLong,
        Overloaded,
        EngineFailed,
        EngineDied,
        OpenError,
    )
}


def by_code(code: str, message: str, param: str | None = None) -> ServerError:
    """Rebuild an error that crossed a process boundary."""
    return CROSSING.get(code, ServerError)(message, param=param)
