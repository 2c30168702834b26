"""From a source and a recipe to a published variant, by the road that the recipe's format needs.

Everything but the clock values in build.json follows from the source and the recipe. A process may be killed
at any moment: the next build goes on after the last stage that the journal has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quant.building import Road, versions
from quant.checkpoint import TOKENIZER, checkpoint_tensors
from quant.errors import BadRecipe, BuildFailed, QuantError
from quant.files import disk_full_is_typed
from quant.ggml import FLOAT_TYPES
from quant.gguf.header import read_header
from quant.journal import Journal
from quant.plan import FloatType, base_type, require_buildable, require_room, variant_key
from quant.progress import Progress, Report
from quant.recipe import SELF, GgufRecipe, Recipe
from quant.source import Source
from quant.store import Build, Variant, VariantStore
from quant.texts import text_files, words_of, write_texts
from quant.torch_plan import PLAIN
from quant.torch_recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from quant.gguf.convert import Conversion
    from quant.text_choice import Text

__all__ = ["Outcome", "Progress", "build_variant", "require_room", "variant_key"]

MODEL = "model.gguf"
IMATRIX = "imatrix.gguf"
PACKAGES = ("gguf", "llama-cpp-python")


@dataclass(frozen=True, slots=True)
class Outcome:
    outcome: Literal["built", "cached"]
    variant: Variant


@dataclass(frozen=True, slots=True)
class How:
    """What the machine decides, not the recipe."""

    threads: int | None
    device: str
    tokens: "Tensor | None"


def build_variant(
    source: Source,
    recipe: Recipe,
    store: VariantStore,
    *,
    progress: Report,
    threads: int | None = None,
    device: str = "auto",
    tokens: "Tensor | None" = None,
) -> Outcome:
    """The variant of `source` under `recipe`, built here only if nobody has built it or is building it.

    `device`: auto, cpu or cuda, for the torch formats. `tokens`: int64 [samples, length] to calibrate on
    instead of the text that the recipe names; the variant's key does not tell of them.

    Raises BadSource and its kinds, BadRecipe, DiskFull, BuildFailed, and what `progress` raises (Cancelled).
    After an error nothing is left in the cache; after a kill, what the next build resumes.
    """
    key = variant_key(source, recipe)
    if found := store.find(key):
        _clear_leftovers(store, key)
        return Outcome("cached", found)
    require_buildable(source, recipe)
    store.sweep()
    with store.building(key) as build:
        if found := store.find(key):
            return Outcome("cached", found)
        with _nothing_left_by_errors(build):
            require_room(source, recipe, store)
            how = How(threads, device, tokens)
            return Outcome("built", _on_the_road(source, recipe, build, progress, how))


def _clear_leftovers(store: VariantStore, key: str) -> None:
    """A builder that was killed just after it published has left its scratch and its locks."""
    if store.scratch(key).exists():
        store.discard_scratch(key)
    store.sweep_locks()


def require_headers(source: Source, recipe: Recipe) -> None:
    """All that headers and small files show, for which the source need not be hashed.

    Raises BadRecipe, BadSource.
    """
    require_buildable(source, recipe)
    if isinstance(recipe, GgufRecipe) and source.kind == "hf":
        from quant.gguf.convert import prepare

        prepare(source)


@contextmanager
def _nothing_left_by_errors(build: Build) -> Iterator[None]:
    """Errors that would come again remove the scratch, and a calibration text that was made since: at worst
    another build's of this moment, which has read it. Interrupts do not: such a build can go on."""
    texts = build.store.cache / "calibration"
    before = set(texts.glob("*"))

    def abandon() -> None:
        build.abandon()
        for file in set(texts.glob("*")) - before:
            file.unlink(missing_ok=True)

    try:
        with disk_full_is_typed():
            yield
    except QuantError:
        abandon()
        raise
    except OSError as error:
        abandon()
        raise BuildFailed(f"the build failed: {error.strerror or type(error).__name__}") from error
    except Exception:
        abandon()
        raise


def _on_the_road(source: Source, recipe: Recipe, place: Build, report: Report, how: How) -> Variant:
    if isinstance(recipe, GgufRecipe):
        road = GgufRoad(source=source, recipe=recipe, place=place, report=report, threads=how.threads)
        return road.build()
    try:
        from quant.stream.plain import PlainRoad
        from quant.stream.road import TorchRoad
    except ModuleNotFoundError as error:
        raise BadRecipe(f"{recipe.name} needs {error.name}, which is not installed") from error
    if recipe.format == PLAIN:
        return PlainRoad(source=source, recipe=recipe, place=place, report=report).build()
    return TorchRoad(
        source=source,
        recipe=recipe,
        place=place,
        report=report,
        threads=how.threads,
        device=how.device,
        tokens=how.tokens,
    ).build()


@dataclass(kw_only=True)
class GgufRoad(Road):
    """Convert, compare the tokenizer, quantize; after a kill, go on after the last stage in the journal."""

    recipe: GgufRecipe
    threads: int | None = None

    def build(self) -> Variant:
        conversion = self._prepare()
        self.place.start()
        self.journal = Journal(self.place.scratch)
        resumed = bool(self.journal)
        model = self.place.out / MODEL
        if conversion is None:
            self._quantize(self.source.path, model)
        else:
            self._from_checkpoint(conversion, model)
            write_texts(text_files(self.source, words_of(conversion)), self.place.out)
        return self.publish(read_header(model).bits_per_weight, versions(*PACKAGES), resumed=resumed)

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
        with self.stage("convert", "bytes") as step:
            convert(self.source, target, float_type=float_type, progress=step)
            self.journal.add("convert", target)

    def _check(self, model: Path) -> None:
        from quant.gguf.probe import compare

        with self.stage("check", "texts"):
            compare(model, self.source.path / TOKENIZER)

    def _quantize(self, base: Path, model: Path) -> None:
        from quant.gguf.kquant import quantize

        if self.journal.has("quantize"):
            return
        recipe = self.recipe
        if recipe.imatrix == SELF:
            recipe = replace(recipe, imatrix=str(self._imatrix(base)))
        with self.stage("quantize", "tensors") as step:
            quantize(base, model, recipe, progress=step, threads=self.threads)
            self.journal.add("quantize", model)

    def _imatrix(self, base: Path) -> Path:
        """Collected here, and published with the model."""
        from quant.gguf.collect import collect
        from quant.gguf.imatrix import write_imatrix

        target = self.place.out / IMATRIX
        if self.journal.has("imatrix"):
            return target
        text, tokens = self._calibration()
        with self.stage("imatrix", "texts") as step:
            sums = collect(base, tokens, progress=step, threads=self.threads)
            write_imatrix(target, sums, text=text.kind, chunk_tokens=text.length)
            self.journal.add("imatrix", target)
        return target

    def _calibration(self) -> "tuple[Text, list[list[int]]]":
        """The text that the torch formats' methods see. Raises BadRecipe without torch, which writes it."""
        try:
            import torch

            from quant.calibrate import calibration_tokens
            from quant.layout import read_layout
            from quant.text_choice import choose_text
        except ModuleNotFoundError as error:
            raise BadRecipe(
                f"an imatrix of the source's own text needs {error.name}, which is not installed"
            ) from error
        layout = read_layout(self.source)
        text = choose_text(Calibration(), layout, "cpu")
        rows, cache = layout.embedding.shape[0], self.place.store.cache
        with self.stage("calibrate", "steps"):
            found = calibration_tokens(
                self.source, text, rows, cache=cache, device=torch.device("cpu"), report=self.report
            )
        return text, found.tolist()
