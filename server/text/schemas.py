"""What a client may ask an answer to be, checked before anything compiles it. Pure.

The bounds keep small requests from becoming large grammars. What stays possible within them is compiled in a
process of its own (server.engine.trial), which also knows which keywords cannot be enforced.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from server.errors import RequestError
from server.text.exact import inexact, inexact_expression
from server.text.finite import is_finite
from server.text.shapes import MAPS, misshapen

MAX_BYTES = 64 << 10
MAX_DEPTH = 32  # schemas in schemas, groups in groups
MAX_ENUM = 1000
MAX_PROPERTIES = 500  # of one object
MAX_REPEATS = 1000
MAX_CHARS = 65_536  # of a string that has a bound
MAX_STEPS = 10_000  # multipleOf, in units of its last decimal: its automaton has so many states

Schema = dict[str, Any]
MERGED = ("allOf", "anyOf", "oneOf", "$ref")  # keywords whose schemas hold for the same value
REPEATS = {
    "minItems": MAX_REPEATS,
    "maxItems": MAX_REPEATS,
    "minProperties": MAX_REPEATS,
    "maxProperties": MAX_REPEATS,
    "minLength": MAX_CHARS,
    "maxLength": MAX_CHARS,
}
OBSOLETE = ("divisibleBy", "disallow", "extends")  # of drafts before 4, which the compiler takes for remarks
REPEAT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")


def check_schema(schema: Schema, param: str) -> None:
    """Raises RequestError that names the keyword and the bound."""
    try:
        check_size(dump(schema), param)
    except RecursionError:
        raise RequestError(f"{param}: is nested too deeply", param=param) from None
    parts = list(nodes(schema))
    for node, depth in parts:
        if depth > MAX_DEPTH:
            raise RequestError(f"{param}: schemas nest at most {MAX_DEPTH} deep", param=param)
        for problem in problems(node):
            raise RequestError(f"{param}: {problem}", param=param)
    for problem in misshapen(schema):
        raise RequestError(f"{param}: {problem}", param=param)
    refers = any("$ref" in node for node, _ in parts)
    if refers and not is_finite(schema, [node for node, _ in parts]):
        raise RequestError(f"{param}: $ref leads in a circle that no value can leave", param=param)


def nodes(schema: Schema) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every object that may be a schema, with its depth. The values of enum, const and the like are data."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, list):
            waiting += [(item, depth) for item in value]
        elif isinstance(value, Mapping):
            yield value, depth
            if depth > MAX_DEPTH:
                return
            for key, item in value.items():
                if key in MAPS and isinstance(item, Mapping):
                    waiting += [(part, depth + 1) for part in item.values()]
                elif key not in ("enum", "const", "default", "examples", "required"):
                    waiting.append((item, depth + 1))


def problems(node: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(values := node.get("enum"), list) and len(values) > MAX_ENUM:
        yield f"enum: at most {MAX_ENUM} values"
    for key in MAPS:
        if isinstance(named := node.get(key), Mapping) and len(named) > MAX_PROPERTIES:
            yield f"{key}: at most {MAX_PROPERTIES} of them"
    for pattern in (node.get("pattern"), *named_patterns(node)):
        if isinstance(pattern, str) and (
            problem := expression_problem(pattern) or inexact_expression(pattern)
        ):
            yield f"pattern: {problem}"
    if isinstance(reference := node.get("$ref"), str) and not reference.startswith("#"):
        yield "$ref: must point to a part of the schema (#/...)"
    yield from (f"{key}: cannot be enforced" for key in OBSOLETE if key in node)
    yield from large_numbers(node)
    yield from inexact(node)


def large_numbers(node: Mapping[str, Any]) -> Iterator[str]:
    for key, limit in REPEATS.items():
        if isinstance(count := node.get(key), int | float) and count > limit:
            yield f"{key}: at most {limit}"
    if isinstance(step := node.get("multipleOf"), int | float) and step > 0 and steps(step) > MAX_STEPS:
        yield f"multipleOf: at most {MAX_STEPS}, counted in its last decimal"
    if isinstance(count := node.get("minProperties"), int | float) and count > certain(node) + 1:
        yield "minProperties: cannot be enforced beyond the number of required properties and one more"


def named_patterns(node: Mapping[str, Any]) -> Sequence[str]:
    return tuple(named) if isinstance(named := node.get("patternProperties"), Mapping) else ()


def certain(node: Mapping[str, Any]) -> int:
    """Properties that are always there; others may be written twice under one name."""
    return len(set(map(str, required))) if isinstance(required := node.get("required"), list) else 0


def steps(step: float) -> int:
    ratio = Fraction(str(step))
    return max(ratio.numerator, ratio.denominator)


def check_expression(pattern: str, param: str) -> None:
    """A regular expression or a grammar. Raises RequestError."""
    check_size(pattern, param)
    if problem := expression_problem(pattern):
        raise RequestError(f"{param}: {problem}", param=param)


def check_size(text: str, param: str, limit: int = MAX_BYTES) -> None:
    if len(text.encode(errors="replace")) > limit:
        raise RequestError(f"{param}: at most {limit} bytes", param=param)


def expression_problem(pattern: str) -> str | None:
    """Counted without reading it closely: a bracket in a class or a text counts, too."""
    depth = deepest = 0
    for char in re.sub(r"\\.", "", pattern, flags=re.DOTALL):
        depth += (char in "([") - (char in ")]")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return f"groups nest at most {MAX_DEPTH} deep"
    counts = [part for found in REPEAT.findall(pattern) for part in found if part]
    if any(len(count) > 6 or int(count) > MAX_REPEATS for count in counts):
        return f"at most {MAX_REPEATS} repeats"
    return None


def settled(schema: Schema) -> str:
    """The schema as it is compiled: every answer to it is an answer to `schema`.

    Objects that name properties and do not say what else they may hold, hold nothing else: a model that has
    to invent names invents many. Where schemas are merged, that could leave nothing, so it is not done.
    """
    merges = any(key in node for node, _ in nodes(schema) for key in MERGED if key == "allOf") or any(
        key in node and "properties" in node for node, _ in nodes(schema) for key in MERGED
    )
    return dump(_settle(schema, closes=not merges))


def _settle(value: Any, *, closes: bool) -> Any:
    if isinstance(value, list):
        return [_settle(item, closes=closes) for item in value]
    if not isinstance(value, Mapping):
        return value
    out: dict[str, Any] = {}
    for key, item in value.items():
        if key in MAPS and isinstance(item, Mapping):
            out[key] = {name: _settle(part, closes=closes) for name, part in item.items()}
        elif key in ("enum", "const", "default", "examples", "required"):
            out[key] = item
        elif key in REPEATS and isinstance(item, float) and item.is_integer():
            out[key] = int(item)  # 3.0: the compiler takes 3 only
        elif (key, item) != ("uniqueItems", False):
            out[key] = _settle(item, closes=closes)
    if closes and is_open(out):
        out["additionalProperties"] = False
    return out


def is_open(node: Mapping[str, Any]) -> bool:
    named = node.get("properties")
    if not isinstance(named, Mapping) or not named:
        return False
    if any(key in node for key in ("additionalProperties", "patternProperties", "minProperties")):
        return False
    required = node.get("required", [])
    return isinstance(required, list) and all(name in named for name in required if isinstance(name, str))


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
