"""The fields of a model in models.yaml: one row each, from which both the checks and the JSON schema come."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import yaml

from quant.errors import BadRecipe
from quant.recipe import parse_recipe
from server.catalog.gates import BadGate, Gates, gate_schema, read_gates
from server.catalog.model import DEFAULT_PARALLEL, NAME, NAME_RULE
from server.catalog.nodes import NULL, STRING, Report, line_of

NEVER = "never"
DURATION = re.compile(r"(\d{1,9}(?:\.\d+)?)([smhd]?)")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_S = 366 * 86400


class Wrong(Exception):
    """What is wrong with a value; `mistakes` are (line, text)."""

    def __init__(self, *mistakes: tuple[int, str]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes

    def tell(self, report: Report, key: str) -> None:
        for line, text in self.mistakes:
            report.add(line, f"{key}: {text}")


Reader = Callable[[yaml.Node], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    about: str
    read: Reader  # raises Wrong with texts that go on from the field's name
    schema: Mapping[str, object]
    default: object = field(default=None)


def kind_of(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
    kinds = {STRING: "a text", NULL: "nothing"}
    kinds |= {f"tag:yaml.org,2002:{tag}": "a number" for tag in ("int", "float")}
    kinds |= {"tag:yaml.org,2002:bool": "yes or no", "tag:yaml.org,2002:timestamp": "a date"}
    return kinds.get(node.tag, f"a {node.tag}")


def shown(value: str) -> str:
    """Someone's text in a message: quoted, escaped and short."""
    return repr(value if len(value) <= 60 else value[:60] + "...")


def is_null(node: yaml.Node) -> bool:
    """A field with nothing after the colon (or null) is a field left out."""
    return bool(node.tag == NULL)


def text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != STRING:
        quotes = " (put it in quotes)" if kind_of(node) in ("a number", "yes or no", "a date") else ""
        raise Wrong((line_of(node), f"must be a text, not {kind_of(node)}{quotes}"))
    if not node.value.strip() or not node.value.isprintable():
        raise Wrong((line_of(node), "must be a text of visible characters"))
    return str(node.value)


def name(node: yaml.Node) -> str:
    value = text(node)
    if not NAME.fullmatch(value):
        raise Wrong((line_of(node), f"{shown(value)}: {NAME_RULE}"))
    return value


def revision(node: yaml.Node) -> str:
    """A commit may look like a number (1234567, 12e4567); it is taken as written."""
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"\w[\w./-]*", node.value) and node.tag != NULL:
        return str(node.value)
    raise Wrong((line_of(node), "must be a branch, tag or commit"))


def recipe(node: yaml.Node) -> str:
    value = text(node)
    try:
        return parse_recipe(value).name
    except BadRecipe as error:
        raise Wrong((line_of(node), str(error))) from error


def listed(read: Callable[[yaml.Node], str]) -> Callable[[yaml.Node], tuple[str, ...]]:
    """A list without repetitions of what `read` reads."""

    def read_list(node: yaml.Node) -> tuple[str, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise Wrong((line_of(node), f"must be a list, not {kind_of(node)}"))
        values: dict[str, None] = {}
        mistakes: list[tuple[int, str]] = []
        for item in node.value:
            try:
                value = read(item)
            except Wrong as wrong:
                mistakes.extend(wrong.mistakes)
                continue
            if value in values:
                mistakes.append((line_of(item), f"{shown(value)} is listed twice"))
            values[value] = None
        if mistakes:
            raise Wrong(*mistakes)
        return tuple(values)

    return read_list


def whole(low: int, high: int) -> Callable[[yaml.Node], int]:
    def read(node: yaml.Node) -> int:
        number = node.value if isinstance(node, yaml.ScalarNode) and kind_of(node) == "a number" else ""
        if not re.fullmatch(r"[1-9]\d{0,15}", number) or not low <= int(number) <= high:
            seen = number or (f"the text {shown(node.value)}" if node.tag == STRING else kind_of(node))
            raise Wrong((line_of(node), f"must be a whole number from {low} to {high}, not {seen}"))
        return int(number)

    return read


def yes_no(node: yaml.Node) -> bool:
    if node.tag != "tag:yaml.org,2002:bool":
        raise Wrong((line_of(node), f"must be true or false, not {kind_of(node)}"))
    return str(node.value).lower() in ("true", "yes", "on")


def gate(node: yaml.Node) -> Gates:
    try:
        return read_gates(node)
    except BadGate as error:
        raise Wrong((error.line, str(error))) from error


def duration(node: yaml.Node) -> float | None:
    """Seconds; None for "never"."""
    value = node.value if isinstance(node, yaml.ScalarNode) else ""
    if value == NEVER:
        return None
    found = DURATION.fullmatch(value)
    seconds = float(found[1]) * SECONDS[found[2]] if found else -1.0
    if not 0 <= seconds <= LONGEST_S:
        raise Wrong(
            (line_of(node), "must be seconds, a time such as 90s, 10m or 2h (366d at most), or never")
        )
    return seconds


def _number(low: int, high: int) -> dict[str, object]:
    return {"type": "integer", "minimum": low, "maximum": high}


NAME_SCHEMA: Mapping[str, object] = {"type": "string", "pattern": f"^{NAME.pattern}$"}
CONTEXT, PARALLEL, THREADS, KV_TOKENS = (16, 16_777_216), (1, 256), (1, 1024), (16, 2**31)

FIELDS: Mapping[str, Field] = {
    "source": Field(
        about="Folder with config.json and safetensors, .gguf file, or hub id (org/name, org/name@revision). "
        "Paths are relative to the folder of this file.",
        read=text,
        schema={"type": "string", "minLength": 1},
    ),
    "revision": Field(
        about="Branch, tag or commit of a hub id.",
        read=revision,
        schema={"type": ["string", "integer"]},
    ),
    "aliases": Field(
        about="More names for the model.",
        read=listed(name),
        schema={"type": "array", "items": NAME_SCHEMA, "uniqueItems": True},
        default=(),
    ),
    "variants": Field(
        about="Recipes that may be asked for as id:recipe, the first by default where `default` names none. "
        "Not for GGUF files and quantized checkpoints, which are served as they are.",
        read=listed(recipe),
        schema={"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    ),
    "default": Field(
        about="The recipe that is served under the bare id.", read=recipe, schema={"type": "string"}
    ),
    "context": Field(
        about="Most tokens of one request, prompt and answer together; at most the model's own context.",
        read=whole(*CONTEXT),
        schema=_number(*CONTEXT),
    ),
    "parallel": Field(
        about="Requests that are answered at the same time.",
        read=whole(*PARALLEL),
        schema=_number(*PARALLEL),
        default=DEFAULT_PARALLEL,
    ),
    "keep_alive": Field(
        about="Idle time after which the model is unloaded: seconds, or 90s, 10m, 2h, 1d, or never.",
        read=duration,
        schema={
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": LONGEST_S},
                {"type": "string", "pattern": rf"^({NEVER}|\d{{1,9}}(\.\d+)?[smhd]?)$"},
            ]
        },
        default=NEVER,
    ),
    "preload": Field(
        about="Build and load the model when the server starts.",
        read=yes_no,
        schema={"type": "boolean"},
        default=False,
    ),
    "backend": Field(
        about="What runs the model; auto takes the first that can open the variant's format.",
        read=text,
        schema={"type": "string"},
        default="auto",
    ),
    "threads": Field(
        about="Threads of the model's engine; without it, what the machine allows.",
        read=whole(*THREADS),
        schema=_number(*THREADS),
    ),
    "kv_tokens": Field(
        about="Tokens of KV memory for all requests, at least `context`; without it, context x parallel.",
        read=whole(*KV_TOKENS),
        schema=_number(*KV_TOKENS),
    ),
    "fallback": Field(
        about="Where memory is short, a smaller variant that is built answers for the default one; "
        "X-Variant says so.",
        read=yes_no,
        schema={"type": "boolean"},
        default=False,
    ),
    "gate": Field(
        about="How far a variant may be from its source to be served: max_kl and max_kl_p99 (nats a token), "
        "min_top1 (a share, or 70%), max_ppl_ratio, max_times_band (mean KL over what its bits promise), "
        "max_times_rounding (squared error of a matrix over what its type rounds off), "
        "each a number or none; serve_anyway: true serves what is beyond them, and says so. `variants` holds "
        "the same for single variants.",
        read=gate,
        schema=gate_schema(),
    ),
    "deterministic": Field(
        about="Answers do not depend on what else runs; each sequence is computed alone, which is slower.",
        read=yes_no,
        schema={"type": "boolean"},
        default=False,
    ),
}
