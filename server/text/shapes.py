"""What kind of value each keyword of JSON schema takes. Pure.

The compiler refuses another kind, too, but by its own words, which may repeat the client's; and it takes some
for remarks.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name to schema
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))

Fits = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_limit(value: Any) -> bool:
    """Drafts up to 4 say true here, of the bound beside it."""
    return isinstance(value, int | float)


def _is_step(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    """3.0 is a whole number, too, from draft 6 on."""
    return _is_number(value) and value >= 0 and value == value // 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_filled(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _names_types(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_filled(names) and _are_texts(names) and set(names) <= TYPES


def _is_schema(value: Any) -> bool:
    return isinstance(value, Mapping | bool)


def _are_schemas(value: Any) -> bool:
    return _is_filled(value) and all(map(_is_schema, value))


def _is_items(value: Any) -> bool:
    """Drafts up to 7 have a list for what is prefixItems now."""
    return _is_schema(value) or (isinstance(value, list) and all(map(_is_schema, value)))


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_schema, value.values()))


TEXT = (_is_text, "a text")
FLAG = (_is_flag, "true or false")
NUMBER = (_is_number, "a number")
COUNT = (_is_count, "a whole number, 0 or more")
SHAPES: Mapping[str, tuple[Fits, str]] = MappingProxyType(
    {
        "type": (_names_types, "the name of a type of JSON, or a list of such names"),
        "enum": (_is_filled, "a list of at least one value"),
        "required": (_are_texts, "a list of names"),
        "items": (_is_items, "a schema"),
        "multipleOf": (_is_step, "a number above 0"),
        "uniqueItems": FLAG,
        **dict.fromkeys(("minimum", "maximum"), NUMBER),
        **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), (_is_limit, "a number")),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), COUNT),
        **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), COUNT),
        **dict.fromkeys(("pattern", "format", "$ref", "$schema", "$id", "$anchor"), TEXT),
        **dict.fromkeys(MAPS, (_is_map, "an object of schemas by name")),
        **dict.fromkeys(LISTS, (_are_schemas, "a list of at least one schema")),
        **dict.fromkeys((name for name in SINGLE if name != "items"), (_is_schema, "a schema")),
    }
)


def misshapen(schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, with the keyword, in a schema and those within it."""
    for node in _schemas(schema):
        for key, value in node.items():
            if key in SHAPES and not SHAPES[key][0](value):
                yield f"{key}: must be {SHAPES[key][1]}"


def _schemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those that are schemas for certain: what a keyword that nobody defines holds is none."""
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Mapping):
            continue
        yield node
        for key, value in node.items():
            if key in MAPS and isinstance(value, Mapping):
                waiting += value.values()
            elif key in LISTS or key in SINGLE:
                waiting += value if isinstance(value, list) else [value]
