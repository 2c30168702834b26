"""One model of models.yaml: its fields read one by one, then held against each other."""

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from server.catalog.fields import FIELDS, Wrong, is_null, shown
from server.catalog.model import DEFAULT_VARIANT, NAME, Model
from server.catalog.nodes import Entry, Report, line_of
from server.catalog.source import Reference, own_type, read_reference


@dataclass(frozen=True, slots=True)
class ModelEntry:
    id: str | None  # None: missing or wrong, which is reported already
    line: int
    fields: dict[str, Entry]

    def names(self) -> Iterator[tuple[str, int]]:
        """Id and aliases, with their lines; what is no name is left out."""
        if self.id:
            yield self.id, self.line
        aliases = self.fields.get("aliases")
        if aliases and isinstance(aliases.value, yaml.SequenceNode):
            written = [node for node in aliases.value.value if isinstance(node, yaml.ScalarNode)]
            unique = {node.value: line_of(node) for node in reversed(written) if NAME.fullmatch(node.value)}
            yield from unique.items()  # a repetition inside the list is the list's mistake


def near(key: str, known: Collection[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key.lower(), known, 1, 0.7)), None)


def check_keys(entries: dict[str, Entry], known: Collection[str], report: Report) -> None:
    """Keys that start with "x-" are the user's own, to hold anchors."""
    for key, entry in entries.items():
        if key not in known and not key.startswith("x-"):
            match = near(key, known)
            hint = f"did you mean {match}?" if match else f"known: {', '.join(known)}"
            report.add(entry.line, f"unknown key {shown(key)}; {hint}")


def read_model(
    entry: ModelEntry, base: Path, backends: Collection[str] | None, report: Report
) -> Model | None:
    """The model, or None when anything about it is wrong and in the report."""
    before = len(report.found)
    values: dict[str, Any] = {}
    for key, field in FIELDS.items():
        given = entry.fields.get(key)
        if given is None or is_null(given.value):
            continue
        try:
            values[key] = field.read(given.value)
        except Wrong as wrong:
            wrong.tell(report, key)
    checks = Checks(entry, values, report)
    checks.source(base)
    checks.variants()
    checks.numbers()
    checks.backend(backends)
    if entry.id is None or len(report.found) > before:
        return None
    return Model(id=entry.id, **values)


class Checks:
    """What fields mean to each other; `values` are those that are right by themselves, completed here."""

    def __init__(self, entry: ModelEntry, values: dict[str, Any], report: Report) -> None:
        self.entry = entry
        self.values = values
        self.report = report
        self.is_ready = False  # the source is served as it is

    def _given(self, key: str) -> bool:
        """The field is there, right or wrong, or a misspelling of it is: either way it is not missing."""
        written = self.entry.fields.get(key)
        if written is not None:
            return not is_null(written.value)
        return any(name not in FIELDS and near(name, FIELDS) == key for name in self.entry.fields)

    def _wrong(self, key: str, text: str) -> None:
        self.report.add(self.entry.fields[key].line, f"{key}: {text}")

    def source(self, base: Path) -> None:
        if "source" not in self.values:
            if not self._given("source"):
                self.report.add(self.entry.line, f"{self.entry.id or 'a model'} has no source")
            return
        try:
            found = read_reference(self.values["source"], base)
            self.values["source"] = found.source
            self._revision(found)
            if (own := own_type(found)) is not None:
                self._ready("a GGUF file" if found.kind == "gguf" else "a quantized checkpoint", own)
        except ValueError as error:
            self._wrong("source", str(error))

    def _revision(self, found: Reference) -> None:
        if "revision" not in self.values:
            self.values["revision"] = found.revision
        elif found.kind != "hub":
            self._wrong("revision", "only a hub id has one")
        elif found.revision:
            self._wrong("revision", "the source names one already")

    def _ready(self, what: str, own: str) -> None:
        for key in ("variants", "default"):
            if key in self.entry.fields and self._given(key):
                self._wrong(key, f"leave it out: {what} is served as it is ({own})")
        self.values |= {"variants": (), "default": own}
        self.is_ready = True

    def variants(self) -> None:
        """For a source that is served as it is `source` has set both, and told of what is written."""
        if self.is_ready:
            return
        variants, default = self.values.get("variants"), self.values.get("default")
        if variants == () and default is None:
            self._wrong("variants", "an empty list: leave it out, or name a recipe")
        elif variants and default is None and not self._given("default"):
            self.values["default"] = variants[0]
        elif variants is None and not self._given("variants"):
            self.values["variants"] = (default or DEFAULT_VARIANT,)
        elif default:
            self._default_is_listed(default, variants or self._written_variants())

    def _default_is_listed(self, default: str, listed: tuple[str, ...]) -> None:
        sound = "variants" in self.values
        if default in listed or (not sound and near(default, listed)):
            return  # where variants are misspelt, one of them may be the default that is meant
        if listed:
            self._wrong("default", f"{default} is not among variants ({', '.join(listed)})")

    def _written_variants(self) -> tuple[str, ...]:
        """What stands in a list of variants in which something is wrong."""
        written = self.entry.fields.get("variants")
        items = written.value.value if written and isinstance(written.value, yaml.SequenceNode) else ()
        return tuple(item.value.lower() for item in items if isinstance(item, yaml.ScalarNode))

    def numbers(self) -> None:
        context, kv_tokens = self.values.get("context"), self.values.get("kv_tokens")
        if context and kv_tokens and kv_tokens < context:
            self._wrong("kv_tokens", f"{kv_tokens} is less than the context ({context})")

    def backend(self, backends: Collection[str] | None) -> None:
        name = self.values.get("backend", "auto")
        if backends is not None and name not in {"auto", *backends}:
            match = near(name, backends)
            hint = f"did you mean {match}?" if match else f"known: auto, {', '.join(sorted(backends))}"
            self._wrong("backend", f"unknown backend {shown(name)}; {hint}")
