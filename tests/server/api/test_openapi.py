"""The description says what the routes do, and docs/api.md says what the description does."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.openapi.document import api_routes, body_of, document
from server.api.openapi.table import OPERATIONS
from server.api.schema.base import Body
from tests.server.api.support import application, client

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


def parameters() -> set[str]:
    pending, names = [Body], set()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("server."):  # other tests make bodies of their own
            names |= set(kind.model_fields)
    return names


@pytest.mark.parametrize("path", sorted({path for _, path in OPERATIONS}))
def test_every_route_has_a_place_in_the_documentation(path: str) -> None:
    assert re.search(rf"^(#|\|).*{re.escape(path)}(?![\w/])", API, re.MULTILINE)


def test_every_parameter_has_a_row_in_the_documentation() -> None:
    rows = {
        name
        for row in re.findall(r"^\| (`.*?) \|", API, re.MULTILINE)
        for name in re.findall(r"`(\w+)[^`]*`", row)
    }
    assert not parameters() - rows
