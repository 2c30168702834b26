"""models.yaml -> Catalog, or every mistake in it."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from server.catalog.entry import ModelEntry, check_keys, near, read_model
from server.catalog.fields import FIELDS, Wrong, is_null, kind_of, name, shown
from server.catalog.model import NAME, NAME_RULE, Catalog, CatalogError, Model
from server.catalog.nodes import Entries, Entry, Report, compose_file, line_of

MAX_MODELS = 1000


def load_catalog(path: Path, *, backends: Collection[str] | None = None, label: str | None = None) -> Catalog:
    """Read models.yaml; sources are relative to its folder. Raises CatalogError with all mistakes, by line.

    `backends`: the names that a model may give (None: any). `label`: how mistakes name the file.
    """
    report = Report(label or str(path))
    models: list[Model | None] = []
    if (root := compose_file(path, report)) is not None:
        entries = list(Reading(report).listed(root))
        models = [read_model(entry, path.absolute().parent, backends, report) for entry in entries]
        _check_names(entries, report)
    if report.found:
        raise CatalogError(report.lines)
    return Catalog(tuple(model for model in models if model))


def _check_names(entries: list[ModelEntry], report: Report) -> None:
    """Ids and aliases are one set of names."""
    taken: dict[str, int] = {}
    for text, line in (named for entry in entries for named in entry.names()):
        if text in taken:
            report.add(line, f"the name {text!r} is taken (line {taken[text]})")
        taken.setdefault(text, line)


class Reading:
    """Finds the models among a file's nodes, in either spelling; reports what is no model and goes on."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.entries = Entries(report)

    def listed(self, root: yaml.Node) -> Iterator[ModelEntry]:
        if not isinstance(root, yaml.MappingNode):
            self.report.add(line_of(root), f"must be a mapping with the key models, not {kind_of(root)}")
            return
        top = self.entries.of(root)
        check_keys(top, ("models",), self.report)
        if models := top.get("models"):
            yield from self._models(models)
        elif not any(near(key, ("models",)) for key in top):
            self.report.add(line_of(root), "the key models is missing")

    def _models(self, models: Entry) -> Iterator[ModelEntry]:
        node = models.value
        if is_null(node) or node.value == []:
            self.report.add(models.line, "models is empty")
        elif isinstance(node, yaml.ScalarNode):
            self.report.add(models.line, f"models must be a list or a mapping, not {kind_of(node)}")
        elif len(node.value) > MAX_MODELS:
            self.report.add(models.line, f"more than {MAX_MODELS} models")
        elif isinstance(node, yaml.MappingNode):
            yield from filter(None, map(self._keyed, self.entries.of(node).values()))
            for entry in self.entries.repeated.get(
                id(node), ()
            ):  # reported as such; it may hold more mistakes
                if again := self._keyed(entry):
                    yield replace(again, id=None)
        else:
            yield from filter(None, map(self._item, node.value))

    def _item(self, node: yaml.Node) -> ModelEntry | None:
        """A model of the list spelling: a mapping with its id inside."""
        if not isinstance(node, yaml.MappingNode):
            self.report.add(
                line_of(node), f"a model must be a mapping with id and source, not {kind_of(node)}"
            )
            return None
        fields = dict(self.entries.of(node))
        check_keys(fields, ("id", *FIELDS), self.report)
        id_ = fields.pop("id", None)
        if id_ is None:
            if not any(near(key, ("id", *FIELDS)) == "id" for key in fields):
                self.report.add(line_of(node), "a model without id")
            return ModelEntry(None, line_of(node), fields)
        try:
            return ModelEntry(name(id_.value), id_.line, fields)
        except Wrong as wrong:
            wrong.tell(self.report, "id")
            return ModelEntry(None, id_.line, fields)

    def _keyed(self, entry: Entry) -> ModelEntry | None:
        """A model of the mapping spelling: its id is the key."""
        id_ = entry.key if NAME.fullmatch(entry.key) else None
        if id_ is None:
            self.report.add(entry.line, f"id: {shown(entry.key)}: {NAME_RULE}")
        if not isinstance(entry.value, yaml.MappingNode):
            self.report.add(
                entry.line, f"{shown(entry.key)} must be a mapping with source, not {kind_of(entry.value)}"
            )
            return None
        fields = dict(self.entries.of(entry.value))
        if "id" in fields:
            self.report.add(
                fields.pop("id").line, f"leave out id: the model's id is its key, {shown(entry.key)}"
            )
        check_keys(fields, FIELDS, self.report)
        return ModelEntry(id_, entry.line, fields)
