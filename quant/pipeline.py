"""From a source and a recipe to a published variant: convert, check, quantize, publish.

Everything but the clock values in build.json follows from the source and the recipe. A process may be killed
at any moment: the next build goes on after the last stage that the journal has.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from quant.checkpoint import TOKENIZER, checkpoint_tensors
from quant.errors import BadSource, BuildFailed, QuantError
from quant.files import disk_full_is_typed
from quant.ggml import FLOAT_TYPES
from quant.gguf.header import read_header
from quant.journal import Journal
from quant.manifest import BuilderRecord, Manifest, RecipeRecord, SourceRecord
from quant.plan import BUILDER_VERSION, FloatType, base_type, require_buildable, require_room, variant_key
from quant.progress import Progress, Report, Stage
from quant.recipe import GgufRecipe, Recipe
from quant.source import Source, digest_again
from quant.store import Build, Variant, VariantStore
from quant.texts import text_files, write_texts

if TYPE_CHECKING:
    from quant.gguf.convert import Conversion

__all__ = ["Outcome", "Progress", "build_variant", "require_room", "variant_key"]

MODEL = "model.gguf"
BUILD = "build.json"
PACKAGES = ("gguf", "llama-cpp-python")


@dataclass(frozen=True, slots=True)
class Outcome:
    outcome: Literal["built", "cached"]
    variant: Variant


class BuildFile(Struct, frozen=True, kw_only=True):
    """build.json: the one file of a variant that differs between two builds of it."""

    outcome: Literal["built"] = "built"
    started: str
    finished: str
    resumed: bool  # an interrupted build had finished a stage
    seconds: dict[str, float]  # by stage


def build_variant(
    source: Source,
    recipe: Recipe,
    store: VariantStore,
    *,
    progress: Report,
    threads: int | None = None,
) -> Outcome:
    """The variant of `source` under `recipe`, built here only if nobody has built it or is building it.

    Raises BadSource and its kinds, BadRecipe, DiskFull, BuildFailed, and what `progress` raises (Cancelled).
    After an error nothing is left in the cache; after a kill, what the next build resumes.
    """
    key = variant_key(source, recipe)
    if found := store.find(key):
        _clear_leftovers(store, key)
        return Outcome("cached", found)
    require_buildable(source, recipe)
    assert isinstance(recipe, GgufRecipe)
    store.sweep()
    with store.building(key) as build:
        if found := store.find(key):
            return Outcome("cached", found)
        with _nothing_left_by_errors(build):
            require_room(source, recipe, store)
            run = _Run(source, recipe, build, Journal(build.scratch), progress, threads)
            return Outcome("built", run.build())


def _clear_leftovers(store: VariantStore, key: str) -> None:
    """A builder that was killed just after it published has left its scratch."""
    if store.scratch(key).exists():
        store.discard_scratch(key)


@contextmanager
def _nothing_left_by_errors(build: Build) -> Iterator[None]:
    """Errors that would come again remove the scratch. Interrupts do not: such a build can go on."""
    try:
        with disk_full_is_typed():
            yield
    except QuantError:
        build.abandon()
        raise
    except OSError as error:
        build.abandon()
        raise BuildFailed(f"the build failed: {error.strerror or type(error).__name__}") from error
    except Exception:
        build.abandon()
        raise


@dataclass
class _Run:
    source: Source
    recipe: GgufRecipe
    place: Build
    journal: Journal
    report: Report
    threads: int | None
    seconds: dict[str, float] = field(default_factory=dict)

    def build(self) -> Variant:
        started = _now()
        conversion = self._prepare()
        self.place.start()
        resumed = bool(self.journal)
        model = self.place.out / MODEL
        if conversion is None:
            self._quantize(self.source.path, model)
        else:
            self._from_checkpoint(conversion, model)
            write_texts(text_files(self.source, conversion), self.place.out)
        self._require_unchanged()
        with self._stage("publish", "files"):
            ended = BuildFile(started=started, finished=_now(), resumed=resumed, seconds=self.seconds)
            (self.place.out / BUILD).write_bytes(msgspec.json.encode(ended) + b"\n")
            return self.place.publish(self._manifest(model))

    def _prepare(self) -> "Conversion | None":
        """Judge the whole checkpoint before anything is written. None: a GGUF source."""
        if self.source.kind == "gguf":
            return None
        from quant.gguf.convert import prepare

        return prepare(self.source)

    def _from_checkpoint(self, conversion: "Conversion", model: Path) -> None:
        if self.recipe.type in FLOAT_TYPES:
            float_type: FloatType = self.recipe.type  # type: ignore[assignment]  # FLOAT_TYPES are FloatType's
            self._convert(model, float_type)
            self._check(model)
            return
        base = self.place.scratch / "base.gguf"
        self._convert(base, base_type(checkpoint_tensors(self.source.path).values()))
        self._check(base)
        self._quantize(base, model)

    def _convert(self, target: Path, float_type: FloatType) -> None:
        from quant.gguf.convert import convert

        if self.journal.has("convert"):
            return
        with self._stage("convert", "bytes") as step:
            convert(self.source, target, float_type=float_type, progress=step)
            self.journal.add("convert", target)

    def _check(self, model: Path) -> None:
        from quant.gguf.probe import compare

        with self._stage("check", "texts"):
            compare(model, self.source.path / TOKENIZER)

    def _quantize(self, base: Path, model: Path) -> None:
        from quant.gguf.kquant import quantize

        if self.journal.has("quantize"):
            return
        with self._stage("quantize", "tensors") as step:
            quantize(base, model, self.recipe, progress=step, threads=self.threads)
            self.journal.add("quantize", model)

    @contextmanager
    def _stage(self, stage: Stage, unit: str) -> Iterator[Callable[[int, int], None]]:
        began = time.monotonic()
        self.report(Progress(stage, 0, 1, unit))
        yield lambda done, total: self.report(Progress(stage, done, total, unit))
        self.seconds[stage] = round(time.monotonic() - began, 3)

    def _require_unchanged(self) -> None:
        same = digest_again(self.source, self.place.store.cache) == self.source.digest
        if not same or variant_key(self.source, self.recipe) != self.place.key:
            raise BadSource("the source or the imatrix changed while the variant was built")

    def _manifest(self, model: Path) -> Manifest:
        files = self.place.records(unlisted=frozenset({BUILD}))
        return Manifest(
            key=self.place.key,
            source=SourceRecord(id=self.source.id, revision=self.source.revision, digest=self.source.digest),
            recipe=RecipeRecord(
                name=self.recipe.name, body=dict(self.recipe.body), digest=self.recipe.digest
            ),
            format=self.recipe.format,
            bits_per_weight=round(read_header(model).bits_per_weight, 4),
            bytes=sum(file.size for file in files),
            builder=BuilderRecord(version=BUILDER_VERSION, packages=_packages()),
            files=files,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # built into the image by hand
            found[name] = "unknown"
    return found
