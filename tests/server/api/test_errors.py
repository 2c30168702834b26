"""One error shape on every route, whatever is wrong with the request."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Response

from quant.errors import DiskFull, QuantError
from server.api.envelope import body_of
from server.api.errors import from_quant, response_of
from server.errors import Overloaded, ServerError
from tests.hostile.operators import VALID
from tests.server.api.support import (
    CHAT,
    COMPLETIONS,
    HELLO,
    application,
    chat,
    client,
    completion,
    error_of,
    events,
    serving,
)
from tests.server.pool.support import children, toy, write_gguf

POSTS = (CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/quantize")
MARKER = "SECRET-marker-0815"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b'{"model":', b'{"model":"\xff"}', b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"],
)
async def test_bad_bodies_are_400_on_every_route(http: httpx.AsyncClient, path: str, raw: bytes) -> None:
    response = await http.post(path, content=raw, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/json; charset=latin-1", "multipart/form-data"]
)
async def test_only_json_is_taken(http: httpx.AsyncClient, path: str, kind: str) -> None:
    response = await http.post(path, content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("coding", ["gzip", "identity, br", "GZIP", "unheard-of"])
async def test_compressed_bodies_are_refused_as_such(http: httpx.AsyncClient, path: str, coding: str) -> None:
    response = await http.post(
        path, content=gzip.compress(b"{}"), headers=JSON | {"content-encoding": coding}
    )
    assert response.status_code == 415
    error = error_of(response)
    assert error["code"] == "unsupported_media_type"
    assert "must not be compressed" in error["message"]


async def test_an_identity_is_no_compression(http: httpx.AsyncClient) -> None:
    body = json.dumps({"model": "toy", "content": "a"})
    for coding in ("identity", ""):
        response = await http.post("/tokenize", content=body, headers=JSON | {"content-encoding": coding})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/toy:q6_k", 404, "model_not_found"),
        ("GET", "/v1/models/toy:nonsense", 404, "model_not_found"),
        ("GET", "/quantize/none", 404, "job_not_found"),
        ("DELETE", "/quantize/none", 404, "job_not_found"),
        ("GET", "/redoc", 404, "not_found"),
    ],
)
async def test_wrong_routes_have_the_shape_too(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


async def test_a_405_names_the_methods_that_a_path_has(http: httpx.AsyncClient) -> None:
    for path, methods in ((CHAT, "POST"), ("/quantize", "GET, POST"), ("/quantize/x", "DELETE, GET")):
        response = await http.patch(path)
        assert response.status_code == 405
        assert response.headers["allow"] == methods


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/quantize"])
async def test_an_unknown_model_is_a_404(http: httpx.AsyncClient, path: str) -> None:
    body = {
        "model": "none",
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "tokens": [1],
        "recipe": "q6_k",
    }
    response = await http.post(path, json=body)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_a_variant_that_does_not_exist_is_a_404_also_for_a_stream(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat(model="toy:q8_0", stream=True))
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_a_large_body_is_refused_before_it_is_read(http: httpx.AsyncClient) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(200):
            read += 1
            yield b"a" * 100_000

    response = await http.post(CHAT, content=body(), headers={**JSON, "content-length": "20000000"})
    assert (response.status_code, read) == (413, 0)
    assert error_of(response)["code"] == "body_too_large"
    response = await http.post(CHAT, content=body(), headers=JSON)  # chunked: its length is not told
    assert response.status_code == 413
    assert read <= 43


@pytest.mark.parametrize("length", ["x", "-1", "9" * 30, "\u0661".encode().decode("latin-1")])
async def test_a_length_that_is_none_is_refused(http: httpx.AsyncClient, length: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", length.encode("latin-1"))]
    response = await http.post(CHAT, content=b"{}", headers=headers)
    assert response.status_code in (400, 413)
    error_of(response)


async def test_large_headers_are_refused(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models", headers={"x-big": "a" * 70_000})
    assert response.status_code == 431
    error_of(response)


async def test_an_unexpected_exception_tells_the_client_nothing_and_the_log_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> Response:
        raise LookupError("SECRET")

    async with application(tmp_path) as app:
        app.add_api_route("/broken", broken)
        async with client(app) as http:
            response = await http.get("/broken")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "SECRET" not in response.text + caplog.text
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "LookupError at test_errors.py:" in record.getMessage()


async def test_a_request_keeps_its_id_if_it_is_a_plain_one(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for id in ("a" * 65, "a b", "\u00e9"):
        response = await http.get("/health", headers={b"x-request-id": id.encode("latin-1")})
        assert response.headers["x-request-id"].startswith("req-")


def spoilt(value: Any) -> Iterator[Any]:
    """The value with the marker in place of each part of it, as a text, in a list, as a name."""
    yield from (MARKER, [MARKER], {MARKER: MARKER}, [[MARKER]])
    for key, part in value.items() if isinstance(value, dict) else ():
        yield {**{name: other for name, other in value.items() if name != key}, MARKER: part}
        yield from ({**value, key: other} for other in spoilt(part))
    for place, part in enumerate(value) if isinstance(value, list) else ():
        yield from ([*value[:place], other, *value[place + 1 :]] for other in spoilt(part))


SPEAKING: tuple[tuple[str, dict[str, Any]], ...] = (
    *VALID,
    (CHAT, {"messages": HELLO, "guided_regex": f"({MARKER}", "max_tokens": 2}),
    (CHAT, {"messages": HELLO, "guided_grammar": f"start: {MARKER}"}),
    (CHAT, {"messages": HELLO, "guided_json": {"type": "object", "not": {"const": MARKER}}}),
    (CHAT, {"messages": HELLO, "guided_json": {"type": "string", "pattern": f"(?<={MARKER})a"}}),
    (CHAT, {"messages": HELLO, "guided_json": {"type": "string", "format": MARKER}}),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": MARKER}}),
)


async def test_errors_repeat_nothing_of_a_request(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong: the parameter and its bound are named, never the value."""
    refused = 0
    for path, fields in SPEAKING:
        body = {"model": "toy", "max_tokens": 2, **fields}
        for wrong in [body, *spoilt(body)]:
            response = await http.post(path, json=wrong, headers={"authorization": f"Bearer {MARKER}"})
            if response.status_code >= 400:
                refused += 1
                assert "secret" not in response.text.lower(), wrong
    assert refused > 500
    assert "secret" not in caplog.text.lower()


@pytest.mark.parametrize(
    "recipe",
    [
        MARKER, {"type": MARKER}, {"type": "q6_k", MARKER: 1}, {"method": MARKER, "format": "awq"},
        {"method": "gptq", "format": MARKER}, {"type": "q6_k", "overrides": [[f"({MARKER}", "q8_0"]]},
        {"type": "q6_k", "overrides": [["x", MARKER]]}, {"type": "q6_k", "imatrix": f"/{MARKER}"},
        {"method": "gptq", "format": "gptq", "scheme": {"bits": MARKER, "group": 128, "symmetric": True}},
    ],
)  # fmt: skip
async def test_refused_recipes_are_not_repeated_either(http: httpx.AsyncClient, recipe: object) -> None:
    response = await http.post("/quantize", json={"model": "toy", "recipe": recipe})
    assert response.status_code == 400
    assert error_of(response)["param"] == "recipe"
    assert "secret" not in response.text.lower()


async def test_a_request_may_limit_its_own_time(tmp_path: Path) -> None:
    long = toy(write_gguf(tmp_path / "toy.gguf", context=60_000), context=60_000)
    async with application(tmp_path, long) as app, client(app) as http:
        assert (await http.post(CHAT, json=chat(max_tokens=2, timeout=20))).status_code == 200
        endless = completion(prompt=[5], max_tokens=50_000, timeout=0.3)
        response = await http.post(COMPLETIONS, json=endless)
        assert response.status_code == 408
        assert error_of(response)["code"] == "timeout"
        slow = {**endless, "stream": True, "timeout": 0.8}  # a busy machine needs some of it to begin
        streamed = events((await http.post(COMPLETIONS, json=slow)).text)
        assert streamed[-1]["error"]["code"] == "timeout"
        assert any(event.get("choices") for event in streamed)
        for wrong in (0, -1, 1e6, "5", True):
            assert (await http.post(CHAT, json=chat(timeout=wrong))).status_code == 400


async def test_a_body_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    async with serving(tmp_path, body_wait_s=0.2) as http:
        response = await http.post(CHAT, content=body(), headers=JSON)
    assert response.status_code == 408
    assert error_of(response)["code"] == "timeout"


def test_waiting_times_become_a_header() -> None:
    response = response_of(Overloaded("full", retry_after=7))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"


def test_build_errors_have_their_status() -> None:
    statuses = {kind.code: from_quant(kind("x")).status for kind in QuantError.__subclasses__()}
    assert statuses[DiskFull.code] == 507
    assert statuses["bad_recipe"] == statuses["bad_source"] == 400
    assert statuses["build_failed"] == 500


def test_every_error_class_has_a_body_in_the_shape() -> None:
    pending = [ServerError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        error = json.loads(body_of(kind("why", param="p")))["error"]
        assert error == {"message": "why", "type": kind.kind, "param": "p", "code": kind.code}
        assert 400 <= kind.status < 600


async def test_cors_is_closed(http: httpx.AsyncClient) -> None:
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = await http.options(CHAT, headers=preflight)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("variant", ["a\nb", "日", " q4_0", "q4_0\n", "../x", "\x00"])
async def test_what_can_be_no_variant_is_a_404_like_any_other(http: httpx.AsyncClient, variant: str) -> None:
    for path, body in (
        (CHAT, chat(model=f"toy:{variant}")),
        (COMPLETIONS, completion(model=f"toy:{variant}")),
    ):
        response = await http.post(path, json=body)
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


async def test_one_variant_has_one_engine_however_it_is_spelt(http: httpx.AsyncClient) -> None:
    for name in ("toy", "toy:q4_0", "toy:Q4_0"):
        response = await http.post(CHAT, json=chat(model=name))
        assert response.headers["x-variant"] == "toy:q4_0"
    assert len(children()) == 1


@pytest.mark.parametrize("variant", ["zqmark", "q6_k", "custom-0123abcd"])
async def test_no_header_of_a_refusal_names_a_variant_that_is_not_there(
    http: httpx.AsyncClient, variant: str
) -> None:
    name = f"toy:{variant}"
    message = {"model": name, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    for path, body in (
        (CHAT, chat(model=name)),
        (CHAT, chat(model=name, stream=True)),
        (COMPLETIONS, completion(model=name)),
        ("/v1/embeddings", {"model": name, "input": "hi"}),
        ("/v1/messages", message),
        ("/v1/messages/count_tokens", {"model": name, "messages": message["messages"]}),
        ("/tokenize", {"model": name, "content": "hi"}),
        ("/apply-template", chat(model=name)),
    ):
        response = await http.post(path, json=body)
        assert response.status_code == 404, path
        assert variant not in str(response.headers), path
        assert variant not in response.text, path
