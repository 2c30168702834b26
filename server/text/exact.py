"""What the compiler of a schema would write otherwise than the schema has it. Pure.

llguidance 1.9 keeps numbers as 64-bit floats, and drops control characters from fixed texts and expressions:
JSON has them as \\uXXXX only, which server.engine.grammars forbids for a reason of its own. It lets a number
reach a whole bound that excludes itself where the other bound is less than one away, reads classes of
characters as Rust does, and forgets prefixItems beside additionalItems.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

LARGEST = 2**53  # up to which a float tells all whole numbers apart
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SHORT = frozenset("\b\t\n\f\r")  # control characters with an escape of their own in JSON
UNIT = re.compile(
    r"\\(?:x(?P<two>[0-9A-Fa-f]{2})|u(?P<four>[0-9A-Fa-f]{4})|[xuU]\{(?P<any>[0-9A-Fa-f]{1,8})\}|(?P<name>.))"
    r"|(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<plain>.)",
    re.DOTALL,
)
ESCAPED = re.compile(r"\\.", re.DOTALL)
OPERATORS = re.compile(r"\[|&&|--|~~")  # of classes, in Rust's expressions
NAMED = {"v": 0x0B, "a": 0x07}


def inexact(node: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one schema, each with its keyword."""
    for key in ("const", "enum"):
        for value in leaves(node.get(key)):
            if isinstance(value, str) and any(map(is_dropped, value)):
                yield f"{key}: control characters cannot be enforced"
            elif is_too_large(value):
                yield f"{key}: numbers beyond {LARGEST} cannot be enforced"
    for key in BOUNDS:
        if is_too_large(node.get(key)):
            yield f"{key}: cannot be enforced beyond {LARGEST}"
    if (reached := reached_bound(node)) is not None:
        yield f"{reached}: a whole number less than 1 from the other bound cannot be excluded"
    if "prefixItems" in node and "additionalItems" in node:
        yield "additionalItems: has no meaning beside prefixItems; use items"


def reached_bound(node: Mapping[str, Any]) -> str | None:
    """The keyword of a bound that numbers would reach although it excludes itself."""
    if node.get("type") == "integer":
        return None
    for key, others, sign in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        bound = node.get(key)
        if not is_number(bound) or bound != int(bound):
            continue
        if any(0 < sign * (other - bound) < 1 for name in others if is_number(other := node.get(name))):
            return key
    return None


def inexact_expression(pattern: str) -> str | None:
    """Classes pass: a control character in one is an alternative that is not taken."""
    for unit in UNIT.finditer(pattern):
        if unit["name"] in ("b", "B"):
            return "word boundaries cannot be enforced"
        if unit["class"] and OPERATORS.search(ESCAPED.sub("", unit["class"][1:])):
            return "[, &&, -- and ~~ within a class of characters cannot be enforced; escape them"
        if (char := character(unit)) is not None and is_dropped(char):
            return "control characters cannot be enforced"
    return None


def character(unit: re.Match[str]) -> str | None:
    """That the unit stands for; None for a class and most escapes."""
    digits = unit["two"] or unit["four"] or unit["any"]
    code = int(digits, 16) if digits else NAMED.get(unit["name"] or "")
    if code is None:
        return unit["plain"]
    return chr(code) if code < 0x110000 else None


def is_dropped(char: str) -> bool:
    return (char < " " and char not in SHORT) or char == "\x7f"


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_too_large(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) > LARGEST


def leaves(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        match waiting.pop():
            case list() as items:
                waiting += items
            case Mapping() as items:
                waiting += items.values()
            case leaf:
                yield leaf
