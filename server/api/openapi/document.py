"""OpenAPI 3.1, made from the routes, their request models, the answers' structs and the table."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from msgspec import Struct

from server.api.auth import OPEN_PATHS
from server.api.envelope import ErrorBody, MessagesError, is_messages
from server.api.openapi.table import EVERYWHERE, OPERATIONS, WITH_BODY, Answer, Operation
from server.api.schema.base import Body, other_names

Json = dict[str, Any]

REFS = "#/components/schemas/{name}"
ABOUT = (
    "An OpenAI-compatible server that quantizes, measures and serves language models. Parameters that nobody "
    "defines are named in X-Ignored-Params; null stands for a parameter's default."
)
HEADERS: Mapping[str, str] = {
    "X-Request-Id": "the client's, or a new one",
    "X-Variant": "the variant that answered",
    "X-Fallback-For": "the variant that was asked for, where memory was short and a smaller one answered",
    "X-Gate": "why the variant that answered is beyond its gate, where it is served anyway",
    "X-Ignored-Params": "parameters that had no effect",
    "Retry-After": "seconds to wait before trying again",
}
OF_MODELS = ("X-Variant", "X-Fallback-For", "X-Gate", "X-Ignored-Params")
EVENTS = "text/event-stream"
ONE_EVENT: Json = {  # OpenAPI 3.1 has no schema of a whole stream
    "type": "object",
    "description": "one of the server-sent events",
    "properties": {name: {"type": "string"} for name in ("event", "id", "data")},
    "required": ["data"],
}
PLAIN: Mapping[str, Json] = {"application/json": {"type": "object"}, EVENTS: ONE_EVENT}
LONG = 1000  # items; a longer list may be more bytes than a body may have, which is another mistake
KEYS: Mapping[str, Json] = {
    "key": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(app: FastAPI, *, keys: bool, model: str) -> Json:
    """`keys`: whether requests have to carry one. `model` is what the examples ask for."""
    routes = sorted(api_routes(app), key=lambda route: (route.tags, route.path_format))
    paths: Json = {}
    schemas = _answer_schemas()
    for route in routes:
        for method in sorted(route.methods or ()):
            entry = _operation(route, OPERATIONS[method, route.path_format], schemas, model)
            if keys and route.path_format not in OPEN_PATHS:
                entry["security"] = [{name: []} for name in KEYS]
            paths.setdefault(route.path_format, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "quantserve", "version": app.version, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "headers": {name: _header(text) for name, text in HEADERS.items()},
            "securitySchemes": dict(KEYS),
        },
    }


def _header(text: str) -> Json:
    return {"description": text, "schema": {"type": "string"}}


def api_routes(app: FastAPI) -> Iterator[APIRoute]:
    """All but HEAD beside GET, of the routers that `create_app` put together."""
    routers: tuple[APIRouter, ...] = app.state.routers
    every = (route for router in routers for route in router.routes if isinstance(route, APIRoute))
    return (route for route in every if route.include_in_schema)


def body_of(route: APIRoute) -> type[Body] | None:
    """The request model that `json_body` was made for."""
    for dependency in route.dependant.dependencies:
        model = getattr(dependency.call, "model", None)
        if model is not None:
            found: type[Body] = model
            return found
    return None


def _operation(route: APIRoute, table: Operation, schemas: Json, model: str) -> Json:
    body = body_of(route)
    entry: Json = {
        "summary": table.summary,
        "operationId": route.name,
        "tags": route.tags or ["operations"],
        "responses": dict(_responses(table, body is not None, route.path_format)),
    }
    named = [_path_parameter(name) for name in route.param_convertors]
    if parameters := named + [_header_parameter(*header) for header in table.reads.items()]:
        entry["parameters"] = parameters
    if body is not None:
        content: Json = {"schema": _request_schema(body, schemas)}
        if table.example is not None:
            content["example"] = {**table.example, "model": model}
        entry["requestBody"] = {"required": True, "content": {"application/json": content}}
    return entry


def _path_parameter(name: str) -> Json:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _header_parameter(name: str, about: str) -> Json:
    return {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}


def _responses(table: Operation, has_body: bool, path: str) -> Iterator[tuple[str, Json]]:
    """Whole answers, and every error that the route can give."""
    headers = ["X-Request-Id", *(OF_MODELS if has_body else ())]
    good = _response(table.status, table.answer, headers)
    if table.streams:
        good["content"][EVENTS] = {"schema": ONE_EVENT}
    yield str(table.status), good
    for status, answer in table.also.items():
        yield str(status), _response(status, answer, headers)
    errors = {*EVERYWHERE, *table.errors, *(WITH_BODY if has_body else ())} - table.also.keys()
    shape = MessagesError if is_messages(path) else ErrorBody
    for status in sorted(errors):
        waits = ["Retry-After"] if status in (429, 503) else []
        yield str(status), _response(status, shape, ["X-Request-Id", *waits])


def _response(status: int, answer: Answer | None, headers: Iterable[str]) -> Json:
    content: Json
    if answer is None:
        content = {}
    elif isinstance(answer, str):
        content = {answer: {"schema": PLAIN.get(answer, {"type": "string"})}}
    else:
        content = {"application/json": {"schema": {"$ref": REFS.format(name=answer.__name__)}}}
    described: Json = {
        "description": HTTPStatus(status).phrase,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
    }
    return {**described, "content": content} if content else described


def _answer_schemas() -> Json:
    every: set[type[Struct]] = {ErrorBody, MessagesError}
    for table in OPERATIONS.values():
        every |= {one for one in (table.answer, *table.also.values()) if one and not isinstance(one, str)}
    _, schemas = msgspec.json.schema_components(
        sorted(every, key=lambda struct: struct.__name__), ref_template="#/components/schemas/{name}"
    )
    return dict(schemas)


def _request_schema(model: type[Body], schemas: Json) -> Json:
    """A reference; the schema, and those that it refers to, are added to `schemas`."""
    schema, parts = _pydantic(model)
    schemas.update(parts)
    schemas[model.__name__] = schema
    return {"$ref": REFS.format(name=model.__name__)}


@cache
def _pydantic(model: type[Body]) -> tuple[Json, Json]:
    schema = _without_long_lists(model.model_json_schema(ref_template="#/components/schemas/{model}"))
    parts: Json = schema.pop("$defs", {})
    required = schema.get("required", ())
    for name, part in schema["properties"].items():
        part.pop("title", None)
        if name not in required:
            schema["properties"][name] = _nullable(part)
    for name, info in model.model_fields.items():
        _name_otherwise(schema, name, other_names(name, info))
    return schema, parts


def _name_otherwise(schema: Json, name: str, others: Sequence[str]) -> None:
    """The parameter under each of its names. One that has to be there may be there under any of them."""
    properties: Json = schema["properties"]
    if others:
        properties[name] = _nullable(properties[name])
    for other in others:
        properties[other] = {**properties[name], "description": f"another name of {name}"}
    if others and name in schema.get("required", ()):
        schema["required"] = [one for one in schema["required"] if one != name]
        schema["anyOf"] = [{"required": [one]} for one in (name, *others)]


def _without_long_lists(value: Any) -> Any:
    """Bounds of long lists are said in words."""
    match value:
        case {"type": "array", "maxItems": int(limit)} if limit > LONG:
            rest = {key: _without_long_lists(item) for key, item in value.items() if key != "maxItems"}
            told = "; ".join([*filter(None, [rest.get("description")]), f"at most {limit:,} items"])
            return {**rest, "description": told}
        case dict():
            return {key: _without_long_lists(item) for key, item in value.items()}
        case list():
            return [_without_long_lists(item) for item in value]
    return value


def _nullable(schema: Json) -> Json:
    """As `schema`, or null, which stands for the default."""
    if any(option == {"type": "null"} for option in schema.get("anyOf", ())):
        return schema
    outer: Json = {key: schema[key] for key in ("default", "description") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    return {"anyOf": [inner, {"type": "null"}], **outer}
