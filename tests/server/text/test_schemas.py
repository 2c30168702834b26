"""What is asked of an answer, before anything is compiled."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from server.errors import RequestError
from server.text.schemas import check_expression, check_schema, settled


def nested(depth: int, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    schema = {"type": "integer"} if schema is None else schema
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "deep": (nested(32), "32 deep"),
    "deeper": (nested(400), "deep"),
    "deep lists": ({"anyOf": [nested(20, {"items": nested(20)})]}, "32 deep"),
    "deep data": ({"const": json.loads("[" * 900 + "]" * 900)}, ""),
    "large": ({"description": "x" * 70_000}, "65536 bytes"),
    "wide": ({"properties": {f"p{i}": {} for i in range(501)}}, "500"),
    "many definitions": ({"$defs": {f"p{i}": {} for i in range(501)}}, "500"),
    "long enum": ({"enum": list(range(1001))}, "1000"),
    "items": ({"type": "array", "minItems": 1001}, "1000"),
    "length": ({"type": "string", "maxLength": 10**9}, "65536"),
    "properties": ({"type": "object", "minProperties": 5}, "minProperties"),
    "multiple": ({"type": "integer", "multipleOf": 123456789}, "multipleOf"),
    "fine multiple": ({"type": "number", "multipleOf": 0.000001234567}, "multipleOf"),
    "groups": ({"pattern": "(" * 33 + ")" * 33}, "32 deep"),
    "names of groups": ({"patternProperties": {"(" * 33 + ")" * 33: {}}}, "32 deep"),
    "repeats": ({"items": {"pattern": "a{1001}"}}, "1000 repeats"),
    "address": ({"$ref": "http://127.0.0.1:1/x"}, "$ref"),
    "file": ({"properties": {"a": {"$ref": "other.json#/x"}}}, "$ref"),
    "text for a number": ({"minimum": "5"}, "minimum: must be a number"),
    "text for a count": ({"items": {"minLength": "5"}}, "minLength: must be a whole number"),
    "fraction for a count": ({"minLength": 3.5}, "minLength: must be a whole number"),
    "float beyond": ({"minProperties": 3.0}, "minProperties"),
    "negative count": ({"maxItems": -1}, "maxItems: must be a whole number"),
    "number for a pattern": ({"properties": {"a": {"pattern": 5}}}, "pattern: must be a text"),
    "unknown type": ({"anyOf": [{"type": ["string", "text"]}]}, "type: must be the name"),
    "no types": ({"type": []}, "type: must be the name"),
    "no values": ({"enum": []}, "enum: must be a list"),
    "no cases": ({"anyOf": []}, "anyOf: must be a list of at least one schema"),
    "no schema": ({"additionalProperties": "no"}, "additionalProperties: must be a schema"),
    "null for a schema": ({"properties": {"a": None}}, "properties: must be an object of schemas"),
    "list of properties": ({"properties": ["a"]}, "properties: must be an object of schemas"),
    "names": ({"required": "a"}, "required: must be a list of names"),
    "negative step": ({"multipleOf": -2}, "multipleOf: must be a number above 0"),
    "number for a reference": ({"$ref": 5}, "$ref: must be a text"),
    "obsolete": ({"type": "integer", "divisibleBy": 3}, "divisibleBy"),
    "control": ({"const": {"a": ["\x01,b"]}}, "const: control"),
    "control of an enum": ({"items": {"enum": [1, "\x7f"]}}, "enum: control"),
    "control in an expression": ({"pattern": "^\x01a$"}, "pattern: control"),
    "escaped control": ({"patternProperties": {r"^\u0001a$": {}}}, "pattern: control"),
    "named control": ({"pattern": r"[^a]\v"}, "pattern: control"),
    "word": ({"pattern": r"\bword\b"}, "pattern: word boundaries"),
    "set of characters": ({"pattern": "^[^a&&b]{1,3}$"}, "pattern: [, &&"),
    "class in a class": ({"pattern": "^[[:alpha:]]{2}$"}, "pattern: [, &&"),
    "open at a whole number": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        "exclusiveMinimum: a whole number",
    ),
    "open below": ({"minimum": -0.5, "exclusiveMaximum": 0}, "exclusiveMaximum: a whole number"),
    "both kinds of items": ({"prefixItems": [{}], "additionalItems": False}, "additionalItems: has no"),
    "long number": ({"const": [2**53 + 2]}, "const: numbers beyond 9007199254740992"),
    "large number": ({"enum": [1e300]}, "enum: numbers beyond"),
    "low": ({"type": "integer", "minimum": -(2**63)}, "minimum: cannot be enforced beyond"),
    "high": ({"type": "number", "exclusiveMaximum": 1e20}, "exclusiveMaximum: cannot be enforced beyond"),
}


@pytest.mark.parametrize(("schema", "word"), BEYOND.values(), ids=BEYOND)
def test_what_is_beyond_the_bounds_is_refused_with_the_bound(schema: dict[str, Any], word: str) -> None:
    if word:
        with pytest.raises(RequestError, match="response_format: ") as caught:
            check_schema(schema, "response_format")
        assert word in str(caught.value)
        assert caught.value.param == "response_format"
    else:
        check_schema(schema, "response_format")  # data: for the compiler to judge


@pytest.mark.parametrize(
    "schema",
    [
        nested(31),
        {"properties": {"enum": {"type": "string"}, "pattern": {"enum": [1]}, "$ref": {"type": "null"}}},
        {"type": "object", "required": ["a", "b"], "minProperties": 3},
        {"type": "integer", "multipleOf": 10_000},
        {"const": {"$ref": "http://data"}},
        {"x-ours": {"minimum": "5"}, "examples": [{"type": 5}], "properties": {"minimum": {}, "type": True}},
        {"minimum": 0, "exclusiveMinimum": True, "items": [{"type": "string"}]},  # of older drafts
        {"type": "string", "minLength": 3.0, "maxLength": 4.0},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.55},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5},
        {"pattern": r"^[a&b\[\-]&&--$"},
        {"enum": ["\b\t\n\f\r", {"\x01": 2**53}, True, "\x80", -0.0]},
        {"pattern": r"^[^\x00-\x1f\]\v]+\\x01[]\x01a]\n\x41\u00e9\\b$", "minimum": -(2**53)},
    ],
)
def test_what_is_within_them_is_taken(schema: dict[str, Any]) -> None:
    check_schema(schema, "response_format")


@pytest.mark.parametrize(
    ("expression", "word"),
    [("(" * 33, "32 deep"), ("[" * 33, "32 deep"), ("a{2,1001}", "repeats"), ("x" * 65537, "bytes")],
)
def test_expressions_have_bounds(expression: str, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        check_expression(expression, "guided_regex")


def test_escaped_brackets_do_not_nest() -> None:
    check_expression(r"\(" * 500 + "[a-z]{1,1000}", "guided_regex")


def test_objects_that_name_properties_hold_nothing_else() -> None:
    schema = {"type": "object", "properties": {"a": {"properties": {"b": {}}}, "c": {"type": "object"}}}
    compiled = json.loads(settled(schema))
    assert compiled["additionalProperties"] is False
    assert compiled["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in compiled["properties"]["c"]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["b"], "properties": {"b": {}}}]},
        {"enum": [{"properties": {"a": 1}}]},
    ],
)
def test_but_what_says_otherwise_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert json.loads(settled(schema)) == schema


def test_whole_floats_are_compiled_as_counts() -> None:
    schema = {"items": {"minLength": 3.0}, "maxItems": 2.0, "const": {"minItems": 1.0}, "maximum": 1.5}
    text = settled(schema)
    assert text == '{"items":{"minLength":3},"maxItems":2,"const":{"minItems":1.0},"maximum":1.5}'


def test_what_is_settled_is_still_a_schema() -> None:
    Draft202012Validator.check_schema(
        json.loads(settled({"uniqueItems": False, "properties": {"uniqueItems": {}}}))
    )
    assert json.loads(settled({"uniqueItems": False, "items": {"uniqueItems": True}})) == {
        "items": {"uniqueItems": True}
    }


NODE: dict[str, Any] = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("schema", "finite"),
    [
        (NODE, True),
        (NODE | {"required": ["v"]}, True),
        (NODE | {"required": ["next"]}, False),
        ({"$ref": "#"}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, False),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, True),
        ({"allOf": [{"$ref": "#"}]}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1.0}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"$ref": "#word", "$defs": {"a": {"$anchor": "word", "type": "string"}}}, True),
        ({"$ref": "#word", "$defs": {"a": {"$anchor": "word", "$ref": "#word"}}}, False),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "integer"}}}, True),
        ({"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(99)}}, True),
    ],
)
def test_a_schema_without_a_finite_value_is_refused(schema: dict[str, Any], finite: bool) -> None:
    if finite:
        check_schema(schema, "guided_json")
    else:
        with pytest.raises(RequestError, match="circle"):
            check_schema(schema, "guided_json")
