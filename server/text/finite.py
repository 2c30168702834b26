"""Whether a schema that refers to itself has any finite value: else it is written for ever."""

import math
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import unquote

ROUNDS = 32  # of marking; a chain of references that takes more is refused, too


def is_finite(schema: Mapping[str, Any], parts: Collection[Mapping[str, Any]]) -> bool:
    """Marks, from the leaves on, what has a finite value. `parts`: every object of the schema."""
    known: set[int] = set()
    anchors = {part["$anchor"]: part for part in parts if isinstance(part.get("$anchor"), str)}
    waiting = list(parts)
    for _ in range(ROUNDS):
        left = []
        for part in waiting:
            if _has_value(part, schema, anchors, known):
                known.add(id(part))
            else:
                left.append(part)
        if id(schema) in known or len(left) == len(waiting):
            break
        waiting = left[::-1]  # a chain of references may run either way
    return id(schema) in known


def _has_value(
    node: Mapping[str, Any], root: Mapping[str, Any], anchors: Mapping[str, object], known: set[int]
) -> bool:
    """Given what is known to have one. Keywords that cannot lead into a circle count as satisfied."""

    def ends(value: object) -> bool:
        return not isinstance(value, Mapping) or id(value) in known

    if isinstance(reference := node.get("$ref"), str) and not ends(target_of(reference, root, anchors)):
        return False
    if not all(map(ends, _list(node.get("allOf")))):
        return False
    for key in ("anyOf", "oneOf"):
        if (cases := _list(node.get(key))) and not any(map(ends, cases)):
            return False
    return all(map(ends, _needed(node)))


def _needed(node: Mapping[str, Any]) -> list[object]:
    """Schemas of what every value of the node holds."""
    match node.get("type"):
        case "object" if isinstance(named := node.get("properties"), Mapping):
            return [named.get(name) for name in _list(node.get("required")) if isinstance(name, str)]
        case "array" if isinstance(count := node.get("minItems"), int | float) and count > 0:
            first = _list(node.get("prefixItems"))[: math.ceil(count)]
            return first if len(first) >= count else [*first, node.get("items")]
    return []


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def target_of(reference: str, root: Mapping[str, Any], anchors: Mapping[str, object]) -> object:
    """What an anchor or a JSON pointer (RFC 6901) in a fragment points to; None where that is nothing."""
    if (name := reference.removeprefix("#")) and not name.startswith("/"):
        return anchors.get(name)
    value: Any = root
    for step in unquote(reference.removeprefix("#")).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and len(key) < 6 and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value
