"""What every road from a source to a variant does: clock its stages, say how it went, publish."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import msgspec
from msgspec import Struct

from quant.errors import BadSource
from quant.manifest import BuilderRecord, Manifest, RecipeRecord, SourceRecord
from quant.plan import builder_version, variant_key
from quant.progress import Progress, Report, Stage
from quant.recipe import Recipe
from quant.source import Source, digest_again
from quant.store import Build, Variant

BUILD = "build.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class BuildFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """build.json: the one file of a variant that differs between two builds of it."""

    outcome: Literal["built"]
    started: str
    finished: str
    resumed: bool  # an interrupted build had finished a stage
    seconds: dict[str, float]  # by stage
    restarted: str | None = None  # why an interrupted build was not gone on with
    device: str | None = None
    notes: list[str] = []  # what a user should know
    blocks: list[dict[str, Any]] = []  # seconds, bytes and peak memory of each


@dataclass(kw_only=True)
class Road:
    """One build. Roads say what lies between `start` and `publish`."""

    source: Source
    recipe: Recipe
    place: Build
    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = field(default_factory=now)

    @contextmanager
    def stage(self, stage: Stage, unit: str) -> Iterator[Callable[[int, int], None]]:
        began = time.monotonic()
        self.report(Progress(stage, 0, 1, unit))
        yield lambda done, total: self.report(Progress(stage, done, total, unit))
        self.seconds[stage] = round(time.monotonic() - began, 3)

    def publish(self, bits_per_weight: float, packages: Mapping[str, str], **facts: Any) -> Variant:
        """`facts`: further fields of build.json. Raises BadSource for a source that is another by now."""
        self._require_unchanged()
        with self.stage("publish", "files"):
            ended = BuildFile(
                outcome="built", started=self.started, finished=now(), seconds=self.seconds, **facts
            )
            (self.place.out / BUILD).write_bytes(msgspec.json.encode(ended) + b"\n")
            return self.place.publish(self._manifest(bits_per_weight, packages))

    def _require_unchanged(self) -> None:
        same = digest_again(self.source, self.place.store.cache) == self.source.digest
        if not same or variant_key(self.source, self.recipe) != self.place.key:
            raise BadSource("the source or a file of the recipe changed while the variant was built")

    def _manifest(self, bits_per_weight: float, packages: Mapping[str, str]) -> Manifest:
        files = self.place.records(unlisted=frozenset({BUILD}))
        return Manifest(
            key=self.place.key,
            source=SourceRecord(id=self.source.id, revision=self.source.revision, digest=self.source.digest),
            recipe=RecipeRecord(
                name=self.recipe.name, body=dict(self.recipe.body), digest=self.recipe.digest
            ),
            format=self.recipe.format,
            bits_per_weight=round(bits_per_weight, 4),
            bytes=sum(file.size for file in files),
            builder=BuilderRecord(version=builder_version(self.recipe), packages=dict(packages)),
            files=files,
        )


def versions(*names: str) -> dict[str, str]:
    """Of these packages; "unknown" for one that was built into an image by hand."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
