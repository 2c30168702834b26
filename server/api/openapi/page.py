"""The description as one page without scripts, fonts or anything else from another machine."""

from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec

Json = dict[str, Any]

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;border-bottom:1px solid #ccc}
code,pre{font:14px ui-monospace,monospace;background:#f4f4f4}
pre{padding:.8rem;overflow:auto}
td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"""
BOUNDS = (
    ("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"),
    ("minLength", "characters from"), ("maxLength", "characters to"), ("minItems", "items from"),
    ("maxItems", "items to"), ("maxProperties", "entries to"),
)  # fmt: skip


def page(description: Json) -> str:
    """HTML of an OpenAPI document made by `document`."""
    info = description["info"]
    body = "".join(_operations(description))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f"<style>{STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info['description'])}"
        f' For tools: <a href="/openapi.json">/openapi.json</a>.</p>{body}</html>'
    )


def _operations(description: Json) -> Iterator[str]:
    schemas = description["components"]["schemas"]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}.</p>"
            if request := operation.get("requestBody"):
                content = request["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
                yield f"<table><tr><th>parameter<th>value<th>default</tr>{''.join(_rows(schema))}</table>"
                if "example" in content:
                    example = msgspec.json.format(msgspec.json.encode(content["example"]))
                    yield f"<pre>{escape(example.decode())}</pre>"
            yield f"<p>Answers: {', '.join(_answer(item) for item in operation['responses'].items())}.</p>"


def _rows(schema: Json) -> Iterator[str]:
    for name, part in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _plain(part.get("default"))
        if {"required": [name]} in schema.get("anyOf", ()):
            default = "required, by one of its names"
        about = f" ({escape(part['description'])})" if "description" in part else ""
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(part))}{about}<td>{escape(default)}</tr>"


def _plain(value: object) -> str:
    return "" if value is None else msgspec.json.encode(value).decode()


def _kind(schema: Json) -> str:
    """A schema in a few words."""
    if options := schema.get("anyOf"):
        return " or ".join(_kind(option) for option in options if option != {"type": "null"})
    if reference := schema.get("$ref"):
        return str(reference.rpartition("/")[2])
    if values := schema.get("enum"):
        return ", ".join(map(str, values))
    if "const" in schema:
        return str(schema["const"])
    bounds = " ".join(f"{word} {schema[key]}" for key, word in BOUNDS if key in schema)
    kind = str(schema.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}))}"
    return f"{kind} {bounds}".strip()


def _answer(item: tuple[str, Json]) -> str:
    status, response = item
    kinds = ", ".join(response.get("content", ())) or "empty"
    return f"{status} {escape(response['description'])} ({escape(kinds)})"
