"""`gate` in models.yaml: limits of a model, and of single variants over them."""

import re
from collections.abc import Mapping

import yaml
from msgspec import Struct
from msgspec.structs import replace

from quant.errors import BadRecipe
from quant.measure.gate import Gate
from quant.recipe import parse_recipe
from server.catalog.nodes import NULL, line_of

NONE = "none"
NUMBER = re.compile(r"(\d{1,6}(?:\.\d{1,9})?|\.\d{1,9})(\s*%)?")
LARGEST = {
    "max_kl": 100.0,
    "max_kl_p99": 100.0,
    "min_top1": 1.0,
    "max_ppl_ratio": 1e6,
    "max_times_band": 1e6,
    "max_times_rounding": 1e6,
}
RULE = f"takes {', '.join(LARGEST)}, serve_anyway and variants"


class BadGate(ValueError):
    """`line` is where."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


class Gates(Struct, frozen=True):
    every: Gate = Gate()
    own: tuple[tuple[str, Gate], ...] = ()  # by variant

    def of(self, variant: str) -> Gate:
        return dict(self.own).get(variant, self.every)


def read_gates(node: yaml.Node) -> Gates:
    """Raises BadGate."""
    entries = _entries(node)
    variants = entries.pop("variants", None)
    every = _gate(entries, Gate())
    if variants is None:
        return Gates(every)
    limits = _entries(variants).items()
    own = tuple((_variant(variants, name), _gate(_entries(one), every)) for name, one in limits)
    return Gates(every, own)


def gate_schema() -> dict[str, object]:
    limits: dict[str, object] = {
        name: {"anyOf": [{"type": "number", "minimum": 0, "maximum": most}, {"type": "string"}]}
        for name, most in LARGEST.items()
    }
    limits["serve_anyway"] = {"type": "boolean"}
    one: dict[str, object] = {"type": "object", "additionalProperties": False, "properties": limits}
    return {**one, "properties": {**limits, "variants": {"type": "object", "additionalProperties": one}}}


def _entries(node: yaml.Node) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise BadGate(line_of(node), f"must be a mapping that {RULE}")
    return {str(key.value): value for key, value in node.value}


def _variant(node: yaml.Node, name: str) -> str:
    try:
        return parse_recipe(name).name
    except BadRecipe as error:
        raise BadGate(line_of(node), f"variants: {error}") from error


def _gate(entries: Mapping[str, yaml.Node], base: Gate) -> Gate:
    return replace(base, **{name: _value(name, node) for name, node in entries.items()})


def _value(name: str, node: yaml.Node) -> float | bool | None:
    if name == "serve_anyway":
        if node.tag != "tag:yaml.org,2002:bool":
            raise BadGate(line_of(node), "serve_anyway must be true or false")
        return str(node.value).lower() in ("true", "yes", "on")
    if name not in LARGEST:
        raise BadGate(line_of(node), f"has no such limit ({name[:40]!r}); it {RULE}")
    if node.tag == NULL or node.value == NONE:
        return None
    found = NUMBER.fullmatch(node.value) if isinstance(node, yaml.ScalarNode) else None
    number = float(found[1]) / (100.0 if found[2] else 1.0) if found else -1.0
    if not 0.0 <= number <= LARGEST[name]:
        raise BadGate(
            line_of(node), f"{name} must be a number from 0 to {LARGEST[name]:g}, a percentage, or {NONE}"
        )
    return number
