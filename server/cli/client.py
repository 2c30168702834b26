"""The smallest client of our own API: lists models and streams one answer, with the standard library only."""

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from server.settings import is_loopback

PATIENT_S = 3600.0
TIMEOUT_S = 60.0  # between two bytes; the server pings every 15 s


class Unreachable(Exception):
    """No server answers, or something else than one."""


class Refused(Exception):
    """The server answered with an error."""


class Message(NamedTuple):
    role: str
    content: str


class ChatClient:
    def __init__(self, url: str, key: str | None = None, max_tokens: int | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            self.url = f"http://{self.url}"
        self.key = key
        self.max_tokens = max_tokens

    def first_model(self) -> str:
        """Raises Unreachable, also for a server without models."""
        try:
            with self._open("/v1/models") as response:
                models: list[Any] = json.load(response)["data"]
            return str(models[0]["id"])
        except (ValueError, LookupError, TypeError, Refused) as error:
            raise Unreachable(f"{self.url} offers no model: {error}") from error

    def post(self, path: str) -> dict[str, Any]:
        """The JSON answer to a POST without a body, which may take as long as a build. Raises as `answer`."""
        with self._open(path, {}, timeout=PATIENT_S) as response:
            found: dict[str, Any] = json.load(response)
        return found

    def answer(self, model: str, messages: list[Message]) -> Generator[str, None, None]:
        """The answer's text, piece by piece. Closing it aborts the request. Raises Refused, Unreachable."""
        body = {
            "model": model,
            "stream": True,
            "messages": [message._asdict() for message in messages],
            "max_completion_tokens": self.max_tokens,
        }
        with self._open("/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise Refused(_message(event))
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""

    def _open(self, path: str, body: object = None, timeout: float = TIMEOUT_S) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return cast(HTTPResponse, self._opener().open(request, timeout=timeout))
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(_error_text(error.code, error.read(100_000))) from error
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = getattr(cause, "strerror", None) or cause
            raise Unreachable(
                f"no server answers at {self.url} ({reason}); start one: quantserve serve"
            ) from error

    def _opener(self) -> urllib.request.OpenerDirector:
        """No proxy stands between us and this machine, whatever the environment says."""
        local = is_loopback(urlsplit(self.url).hostname or "")
        return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE]. Raises Unreachable where the stream breaks off."""
    try:
        for line in response:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    except (OSError, HTTPException, ValueError) as error:
        raise Unreachable(f"the answer broke off: {error}") from error


def _error_text(status: int, raw: bytes) -> str:
    try:
        return _message(json.loads(raw))
    except (ValueError, LookupError, TypeError):
        return f"the server answered {status}"


def _message(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])
