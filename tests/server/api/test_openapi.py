"""The description says what the routes do, and docs/api.md says what the description does."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.openapi.document import api_routes, body_of, document
from server.api.openapi.table import OPERATIONS
from server.api.schema.admin import PullRequest, QuantizeRequest
from server.api.schema.base import Body
from server.api.schema.chat import ChatRequest
from server.api.schema.completions import CompletionRequest
from server.api.schema.embeddings import EmbeddingRequest
from server.api.schema.messages import CountTokensRequest, MessagesRequest
from server.api.schema.responses import ResponsesRequest
from server.api.schema.structured import Structured
from server.api.schema.tokens import DetokenizeRequest, TokenizeRequest
from tests.server.api.support import application, client

PARTS: dict[type[Body], str] = {  # where docs/api.md has the rows of a request
    ChatRequest: "POST /v1/chat",
    CompletionRequest: "POST /v1/completions",
    ResponsesRequest: "POST /v1/responses",
    MessagesRequest: "POST /v1/messages",
    CountTokensRequest: "POST /v1/messages",
    EmbeddingRequest: "POST /v1/embeddings",
    TokenizeRequest: "POST /tokenize",
    DetokenizeRequest: "POST /tokenize",
    QuantizeRequest: "/quantize",
    PullRequest: "/quantize",
}
API = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def references(value: object) -> list[str]:
    match value:
        case {"$ref": str(name)}:
            return [name]
        case dict():
            return [name for item in value.values() for name in references(item)]
        case list():
            return [name for item in value for name in references(item)]
    return []


def found(description: dict[str, Any], reference: str) -> object:
    part: Any = description
    for name in reference.removeprefix("#/").split("/"):
        part = part[name]
    return part


async def test_every_route_is_described_and_nothing_else(tmp_path: Path) -> None:
    async with application(tmp_path) as app:
        routes = {(method, r.path_format) for r in api_routes(app) for method in r.methods or ()}
        description = document(app, keys=False, model="toy")
    assert routes == set(OPERATIONS)
    described = {(m.upper(), path) for path, methods in description["paths"].items() for m in methods}
    assert described == routes
    for reference in references(description):
        assert found(description, reference)
    ids = [
        operation["operationId"]
        for methods in description["paths"].values()
        for operation in methods.values()
    ]
    assert len(set(ids)) == len(ids)


async def test_every_body_has_an_example_that_is_taken(tmp_path: Path) -> None:
    async with application(tmp_path) as app, client(app) as http:
        posts = [(route, body) for route in api_routes(app) if (body := body_of(route)) is not None]
        assert len(posts) > 5
        for route, _ in posts:
            example = OPERATIONS["POST", route.path_format].example
            assert example is not None
            if route.path_format not in ("/quantize", "/admin/pull"):  # a GGUF file is served as it is
                response = await http.post(route.path_format, json={**example, "model": "toy"})
                assert response.status_code == 200, response.text


async def test_null_is_described_where_it_is_taken(http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    properties = schemas["ChatRequest"]["properties"]
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    for name in properties.keys() - {"model", "messages"}:
        assert {"type": "null"} in properties[name]["anyOf"], name
    assert properties["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}


async def test_a_key_is_described_where_one_is_asked_for(tmp_path: Path) -> None:
    async with application(tmp_path, api_keys=("k",)) as app:
        async with client(app) as http:
            for path in ("/openapi.json", "/docs"):
                assert (await http.get(path)).status_code == 401
        async with client(app, authorization="Bearer k") as http:
            paths = (await http.get("/openapi.json")).json()["paths"]
    open_paths = [path for path, methods in paths.items() if "security" not in next(iter(methods.values()))]
    assert sorted(open_paths) == ["/health", "/ready"]


async def test_the_page_needs_no_other_machine(http: httpx.AsyncClient) -> None:
    response = await http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "/v1/chat/completions" in response.text
    assert "top_logprobs" in response.text
    assert not re.search(r"<script|src=|https?://", response.text)


async def test_no_list_is_bound_beyond_what_a_body_can_hold(tmp_path: Path) -> None:
    """A generator of requests that tries one more would get 413 instead of 400."""

    def limits(value: Any) -> list[int]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        own = [value["maxItems"]] if isinstance(value, dict) and "maxItems" in value else []
        return own + [limit for item in inner for limit in limits(item)]

    async with application(tmp_path) as app:
        described = document(app, keys=False, model="m")
    assert max(limits(described["components"]["schemas"])) <= 1000
    assert "at most 4,096 items" in str(described["components"]["schemas"]["ChatRequest"])


async def test_a_stream_is_described_by_its_events(tmp_path: Path) -> None:
    async with application(tmp_path) as app:
        paths = document(app, keys=False, model="m")["paths"]
    streams = [
        answer["content"]["text/event-stream"]["schema"]
        for operations in paths.values()
        for operation in operations.values()
        for answer in operation["responses"].values()
        if "text/event-stream" in answer.get("content", {})
    ]
    assert len(streams) == 5
    assert all(schema["required"] == ["data"] for schema in streams)


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_every_route_has_a_place_in_the_documentation(method: str, path: str) -> None:
    """A heading or a row that names both."""
    place = rf"^(#|\|).*\b{method.upper()}\b[^|#]*{re.escape(path)}(?![\w/])"
    assert re.search(place, API, re.MULTILINE)


@pytest.mark.parametrize("kind", PARTS)
def test_every_parameter_has_a_row_in_its_part_of_the_documentation(kind: type[Body]) -> None:
    """What chat has, too, may be referred to."""
    [part] = [part for part in API.split("\n## ") if part.startswith(PARTS[kind])]
    [chat] = [part for part in API.split("\n## ") if part.startswith(PARTS[ChatRequest])]
    referred = rows_of(chat) if re.search(r"those of\s+chat", part) and kind is not ChatRequest else {"model"}
    assert not names_of(kind) - rows_of(part) - (referred & names_of(Structured))


@pytest.mark.parametrize("part", sorted(set(PARTS.values())))
async def test_every_documented_parameter_is_described(part: str, http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    known = {
        name
        for kind, place in PARTS.items()
        if place == part
        for name in schemas[kind.__name__]["properties"]
    }
    [text] = [one for one in API.split("\n## ") if one.startswith(part)]
    rows = rows_of("\n\n".join(re.findall(r"^\| parameter \|.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)))
    assert rows
    assert not rows - known


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("ChatRequest", "guided_regex", "regex"),
        ("CompletionRequest", "guided_choice", "choice"),
        ("CompletionRequest", "guided_grammar", "lark"),
        ("ChatRequest", "reasoning_budget", "thinking_budget"),
        ("ChatRequest", "reasoning_budget", "thinking_token_budget"),
        ("TokenizeRequest", "add_special", "add_special_tokens"),
        ("TokenizeRequest", "content", "prompt"),
    ],
)
async def test_other_names_are_described_alike(
    http: httpx.AsyncClient, kind: str, name: str, other: str
) -> None:
    properties = (await http.get("/openapi.json")).json()["components"]["schemas"][kind]["properties"]
    assert properties[other] == {**properties[name], "description": f"another name of {name}"}


async def test_a_text_to_tokenize_may_have_either_name(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()["components"]["schemas"]["TokenizeRequest"]
    assert schema["required"] == ["model"]
    assert schema["anyOf"] == [{"required": ["content"]}, {"required": ["prompt"]}]
    for name in ("content", "prompt"):
        assert (await http.post("/tokenize", json={"model": "toy", name: "a"})).status_code == 200
    missing = await http.post("/tokenize", json={"model": "toy"})
    assert missing.json()["error"]["param"] == "content"


async def test_every_documented_header_is_described(http: httpx.AsyncClient) -> None:
    described = (await http.get("/openapi.json")).json()
    operations = [one for methods in described["paths"].values() for one in methods.values()]
    asked = {
        one["name"] for entry in operations for one in entry.get("parameters", ()) if one["in"] == "header"
    }
    told = {
        name
        for entry in operations
        for answer in entry["responses"].values()
        for name in answer.get("headers", ())
    }
    of_every_body = {"Content-Type", "Content-Encoding"}  # HTTP's own, of the body and not of the request
    documented = set(re.findall(r"`((?:[A-Z]\w*-)+\w+)`", API)) - of_every_body
    assert {"X-Gate", "X-Ignored-Params", "Last-Event-ID"} <= documented
    assert not documented - asked - told
    assert told == set(described["components"]["headers"])


async def test_no_request_is_missed(tmp_path: Path) -> None:
    async with application(tmp_path) as app:
        assert {body_of(route) for route in api_routes(app)} - {None} == {*PARTS}


def names_of(kind: type[Body]) -> set[str]:
    """With the other names that fields have."""
    found = set(kind.model_fields)
    for info in kind.model_fields.values():
        found |= {name for name in getattr(info.validation_alias, "choices", ()) if isinstance(name, str)}
    return found


def rows_of(part: str) -> set[str]:
    rows = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)[^`]*`", row)}
