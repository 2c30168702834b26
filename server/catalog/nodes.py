"""YAML as nodes that remember their lines.

Composing does not expand aliases, and nothing here walks deeper than it is asked to, so a file of
nested aliases ("billion laughs") costs no more than its length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STRING = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"
MERGE = "tag:yaml.org,2002:merge"


@dataclass(slots=True)
class Report:
    """Collects mistakes, each once, so that a shared anchor's mistake is one line."""

    label: str  # the file as the user named it
    found: dict[tuple[int, str], None] = field(default_factory=dict)

    def add(self, line: int, text: str) -> None:
        self.found[line, text] = None

    @property
    def lines(self) -> list[str]:
        return [f"{self.label}:{line}: {text}" for line, text in sorted(self.found)]


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def compose_file(path: Path, report: Report) -> yaml.Node | None:
    """The file's root node, or None with the reason in `report`."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        report.add(1, f"cannot be read: {(error.strerror or 'failed').lower()}")
        return None
    except UnicodeDecodeError as error:
        report.add(raw.count(b"\n", 0, error.start) + 1, "not UTF-8")
        return None
    if len(raw) > MAX_BYTES:
        report.add(1, f"larger than {MAX_BYTES // 1024} KiB")
        return None
    return compose(text, report)


def compose(text: str, report: Report) -> yaml.Node | None:
    """The root node, or None with the reason in `report`: a syntax error, nothing in it, nested too deep."""
    try:
        if line := too_deep(text):
            report.add(line, f"nested deeper than {MAX_DEPTH} levels")
            return None
        root: yaml.Node | None = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.context, error.problem) if part]
        report.add(mark.line + 1 if mark else 1, f"YAML syntax: {', '.join(parts)}")
        return None
    except yaml.reader.ReaderError as error:
        report.add(
            text.count("\n", 0, error.position) + 1, "YAML syntax: a character that YAML does not allow"
        )
        return None
    if root is None:
        report.add(1, "the file is empty")
    return root


def too_deep(text: str) -> int:
    """The line where nesting exceeds MAX_DEPTH, or 0. Reads events, as composing recurses."""
    depth = 0
    for event in yaml.parse(text, Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return 1 + (event.start_mark.line if event.start_mark else 0)
    return 0


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    line: int  # of the key
    value: yaml.Node


class Entries:
    """A mapping's entries with merges (`<<: *defaults`) taken in; own keys win, then the merges in order."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.known: dict[int, dict[str, Entry]] = {}
        self.repeated: dict[int, list[Entry]] = {}  # by node, entries whose key was there before
        self.open: set[int] = set()

    def of(self, node: yaml.MappingNode) -> dict[str, Entry]:
        """Each node is read once, however often it is merged; mistakes go to the report."""
        if id(node) in self.open or len(self.open) > MAX_DEPTH:
            self.report.add(line_of(node), "a mapping that merges itself, or too many that merge each other")
            return {}
        if id(node) not in self.known:
            self.open.add(id(node))
            self.known[id(node)] = self._read(node)
            self.open.discard(id(node))
        return self.known[id(node)]

    def _read(self, node: yaml.MappingNode) -> dict[str, Entry]:
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for other in self._merges(value):
                    merged = self.of(other) | merged
            elif not isinstance(key, yaml.ScalarNode):
                self.report.add(line_of(key), "a key must be a plain word")
            elif key.value in own:
                entry = Entry(key.value, line_of(key), value)
                self.repeated.setdefault(id(node), []).append(entry)
                self.report.add(
                    entry.line, f"{entry.key!r} is given twice (first on line {own[entry.key].line})"
                )
            else:
                own[key.value] = Entry(key.value, line_of(key), value)
        return merged | own

    def _merges(self, value: yaml.Node) -> Iterator[yaml.MappingNode]:
        for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(node, yaml.MappingNode):
                yield node
            else:
                self.report.add(line_of(node), "<<: takes a mapping or a list of mappings")
