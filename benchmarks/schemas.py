"""Random JSON schemas and functions, from a seed: objects, arrays, strings, numbers, enum, anyOf and $ref."""

from random import Random
from typing import Any

Schema = dict[str, Any]

WORDS = ("city", "name", "age", "color", "count", "items", "tags", "price", "date", "unit", "title", "score")
PATTERNS = (
    "^[a-z]{2,8}$",
    "^[A-Z][a-z]+$",
    r"^\d{3}-\d{4}$",
    "^(red|green|blue)$",
    "[0-9]+",
    "^#[0-9a-f]{6}$",
)
FORMATS = ("date", "time", "email", "uuid", "ipv4")
REFUSED: tuple[Schema, ...] = (  # one in twelve schemas holds a keyword that cannot be enforced
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"not": {"type": "string"}},
    {"type": "string", "format": "phone"},
    {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]},
)
REFUSED_SHARE = 1 / 12
DEPTH = 6


class Maker:
    """Makes schemas; `definitions` are those that it refers to."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._definitions: dict[str, Schema] = {}

    def schema(self, depth: int = DEPTH, refused_share: float = REFUSED_SHARE) -> Schema:
        """An object, as clients ask for, with its definitions."""
        root = self._object(depth - 1)
        if self._random.random() < refused_share:
            root["properties"]["odd"] = self._random.choice(REFUSED)
            root["required"] = [*root.get("required", []), "odd"]
        return root | ({"$defs": self._definitions} if self._definitions else {})

    def _any(self, depth: int) -> Schema:
        leaves = [self._string, self._number, self._enum, self._boolean]
        if depth <= 1:
            return self._random.choice(leaves)()
        inner = [self._object, self._array, self._either, self._reference]
        if self._random.random() < 0.6:
            return self._random.choice(leaves)()
        return self._random.choice(inner)(depth - 1)

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(WORDS, self._random.randint(1, 4))
        made: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        if required := [name for name in names if self._random.random() < 0.7]:
            made["required"] = required
        if self._random.random() < 0.5:
            made["additionalProperties"] = False
        return made

    def _array(self, depth: int) -> Schema:
        low = self._random.randint(0, 2)
        made: Schema = {"type": "array", "items": self._any(depth), "minItems": low}
        return made | {"maxItems": low + self._random.randint(0, 3)}

    def _either(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(2, 3))]}

    def _reference(self, depth: int) -> Schema:
        """To a definition that is complete, so that none refers to itself."""
        if not self._definitions or self._random.random() < 0.5:
            made = self._any(depth)
            self._definitions[f"part{len(self._definitions)}"] = made
        return {"$ref": f"#/$defs/{self._random.choice(sorted(self._definitions))}"}

    def _string(self) -> Schema:
        match self._random.randrange(4):
            case 0:
                return {"type": "string", "pattern": self._random.choice(PATTERNS)}
            case 1:
                return {"type": "string", "format": self._random.choice(FORMATS)}
            case 2:
                low = self._random.randint(0, 8)
                return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 30)}
        return {"type": "string"}

    def _number(self) -> Schema:
        low = self._random.randint(-1000, 1000)
        kind = self._random.choice(("integer", "number"))
        bounds: Schema = {"minimum": low} if self._random.random() < 0.7 else {}
        if self._random.random() < 0.7:
            key = self._random.choice(("maximum", "exclusiveMaximum"))
            bounds[key] = low + self._random.randint(2, 5000)
        if kind == "integer" and not bounds and self._random.random() < 0.3:
            bounds["multipleOf"] = self._random.randint(2, 50)
        return {"type": kind, **bounds}

    def _enum(self) -> Schema:
        values: list[Any] = [*self._random.sample(WORDS, 3), self._random.randint(0, 9), None]
        return {"enum": values[self._random.randint(0, 2) :]}

    def _boolean(self) -> Schema:
        return self._random.choice(({"type": "boolean"}, {"const": "fixed"}, {"type": ["integer", "null"]}))


def functions(seed: int, count: int) -> list[Schema]:
    """A set of functions, with parameters that are enforceable and not too long to write."""
    made: list[Schema] = []
    for number in range(count):
        parameters = Maker(seed * 100 + number).schema(depth=3, refused_share=0.0)
        made.append({"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters}})
    return made
