"""The effects of a search: mixtures are scored, recipes built and measured, as quant.search decides."""

import asyncio
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from quant.errors import BadSource, BuildFailed, UnknownVariant, VariantInUse
from quant.gguf.header import GgufHeader, read_header
from quant.measure.estimate import mean_divergence
from quant.measure.figures import figure
from quant.measure.gate import Gate, judge
from quant.measure.measurement import Figure, Measurement, read_measurement
from quant.measure.score import Answered, Expected, Reference, compare_answers
from quant.measure.text import Chunk, Text
from quant.plan import BUILDER_VERSION, TORCH_BUILDER_VERSION, require_buildable
from quant.progress import Progress
from quant.recipe import Recipe, parse_recipe
from quant.search.compared import Guesses
from quant.search.decide import Confirm, ProbeTypes, Stop, TryRecipe, next_step
from quant.search.evidence import Evidence, Probe, Try
from quant.search.found import Found, found_of
from quant.search.gguf_space import gguf_space
from quant.search.guesses import guesses_of
from quant.search.shelf import SearchShelf
from quant.search.space import Space
from quant.search.torch_space import torch_space
from quant.source import Source
from quant.store import Variant, VariantStore
from server.backends import registry
from server.pool.builds import Order, run_child
from server.pool.opening import gguf_context, own_context, served_context
from server.process.asking import Asker, NotFinite
from server.process.builder import Reporter
from server.process.client import EngineClient
from server.process.orders import MeasureOrder, SearchOrder
from server.process.probing import Quiet, built, gguf_probe, torch_probe
from server.process.reference import SHARD, ReferenceMaker
from server.types import Open

FAR = 1e3  # nats: what counts for a file that computes no numbers
PLAINEST = {"gguf": "q8_0", "compressed-tensors": "w8a16"}  # what cannot become this becomes no mixture


class Searching:
    def __init__(self, order: SearchOrder, source: Source, store: VariantStore, reporter: Reporter) -> None:
        self.order, self.source, self.store, self.reporter = order, source, store, reporter
        self._texts: list[tuple[Chunk, Expected]] = []
        self._context = 0
        self._base = Path()

    async def run(self) -> Found:
        """Raises BadRecipe, BadSource, BuildFailed."""
        require_buildable(self.source, parse_recipe(PLAINEST[self.order.target.format]))
        space = await self._prepare()
        shelf = SearchShelf(self.store.cache, self._what(space), self.order.target)
        with shelf.held():
            evidence = self._with_known(shelf.load())
            while not isinstance(step := next_step(self.order.target, space, evidence), Stop):
                self._tell(space, evidence)
                match step:
                    case ProbeTypes(types):
                        kl = await self._scored(dict(types), space, shelf.folder)
                        size = space.bytes(types) if len(types) == len(space.groups) else 0
                        evidence = evidence.with_probe(Probe(types=dict(types), bytes=size, kl=kl))
                    case TryRecipe(recipe, stage):
                        tried = await self._tried(recipe)
                        evidence = evidence.with_try(replace(tried, stage=stage))
                        self._say(tried)
                    case Confirm(key):
                        evidence = evidence.with_try(await self._confirmed(key, evidence))
                shelf.save(evidence)
            self._clear(evidence, step.winner)
            guesses = await self._guesses(space, evidence, shelf)
        return found_of(self.order.target, step.winner, step.why, evidence, space, guesses)

    # -- before the first step --------------------------------------------------------------------

    async def _prepare(self) -> Space:
        """The source as one float GGUF file, and what it says of the search's texts."""
        self.reporter.progress(Progress("reference", 0, 1, ""))
        order = self._measure_order("llama", texts=self.order.texts, context=self.order.context or 0)
        files = ReferenceMaker(order, self.source, self.store).files
        own = own_context(files) if files.is_dir() else gguf_context(files)
        self._context = served_context(self.order.context, own, self.order.default_context)
        async with ReferenceMaker(replace(order, context=self._context), self.source, self.store) as maker:
            for number in range(-(-self.order.texts // SHARD)):
                shard = await maker.shard(number)
                assert shard is not None, "a source never tires of writing"
                reference = shard.reference
                self._texts += zip(reference.text.chunks, reference.chunks, strict=True)
        self._base = files / "model.gguf" if files.is_dir() else files
        if self.order.target.format == "compressed-tensors":
            return torch_space(self.source, most_groups=self.order.groups)
        header = read_header(self._base)
        return gguf_space(header, fixed=self._fixed(header, files), most_groups=self.order.groups)

    def _fixed(self, header: GgufHeader, files: Path) -> int:
        """Bytes of a variant beside its tensors: the file's header, tokenizer and template."""
        tensors = sum(one.end - one.start for one in header.tensors)
        found = self.store.find(files.name) if files.is_dir() else None
        return (found.manifest.bytes if found else self._base.stat().st_size) - tensors

    def _what(self, space: Space) -> list[object]:
        """All that figures depend on, but for the target."""
        versions = [BUILDER_VERSION, TORCH_BUILDER_VERSION]
        names = [group.name for group in space.groups]
        return [self.source.digest, versions, self._context, self.order.texts, names]

    def _with_known(self, evidence: Evidence) -> Evidence:
        """What was measured before counts as tried."""
        for variant in self.store.list():
            if variant.manifest.source.digest == self.source.digest and (found := self._usable(variant)):
                tried = _try_of(variant, found, self.order.gate)
                known = next((one for one in evidence.tries if one.key == variant.key), None)
                evidence = evidence.with_try(tried if known is None else replace(tried, stage=known.stage))
        return evidence

    def _usable(self, variant: Variant) -> Measurement | None:
        found = read_measurement(variant.path, variant.manifest)
        if found is None or found.reference.kind != "self" or found.reference.source != self.source.digest:
            return None
        enough = found.complete and found.reference.texts >= self.order.measured_texts
        return found if enough and found.context == self._context else None

    async def _guesses(self, space: Space, evidence: Evidence, shelf: SearchShelf) -> Guesses:
        """Beside measured sensitivities; none where there are none, or where the file cannot be watched."""
        if not any(probe.alone for probe in evidence.probes):
            return {}
        found: Guesses | None = shelf.guesses()
        if found is None:
            texts = [chunk.tokens for chunk, _ in self._texts]
            try:
                found = await asyncio.to_thread(
                    guesses_of, self._base, space.groups, texts, self.order.threads
                )
            except (BadSource, BuildFailed) as error:
                self.reporter.note(f"toolkits' guesses could not be made: {error}")
                return {}
            shelf.save_guesses(found)
        return found

    # -- steps ------------------------------------------------------------------------------------

    async def _scored(self, types: dict[str, str], space: Space, folder: Path) -> Figure:
        """Mean divergence of a mixture, or of one group alone, on the search's texts."""
        if self.order.target.format == "gguf":
            async with gguf_probe(types, space, self._base, folder, self.order.threads) as path:
                return await self._divergence(path, "llama")
        async with torch_probe(types, space, self.source.path, folder) as path:
            return await self._divergence(path, registry.for_format("compressed-tensors").name)

    async def _divergence(self, path: Path, backend: str) -> Figure:
        """Through the engine that would serve it."""
        engine = await EngineClient.start(
            Open(
                backend=backend,
                variant=str(path),
                context=self._context,
                parallel=self.order.parallel,
                threads=self.order.threads,
            )
        )
        try:
            asker = Asker(engine)
            answers = await asker.all(lambda pair: _answered(asker, *pair), self._texts)
        except NotFinite:
            return Figure(FAR, FAR)
        finally:
            await engine.stop()
        parts = [
            compare_answers([answer], _one(chunk, expected))
            for answer, (chunk, expected) in zip(answers, self._texts, strict=True)
        ]
        return figure(mean_divergence([chunk for part in parts for chunk in part.divergence]))

    async def _tried(self, recipe: str | Recipe) -> Try:
        variant = await self._built(recipe)
        found = self._usable(variant)
        if found is None:
            found = await self._measured(variant, texts=self.order.measured_texts)
        return _try_of(variant, found, self.order.gate)

    async def _confirmed(self, key: str, evidence: Evidence) -> Try:
        """The winner, measured with all that a report shows."""
        (known,) = (one for one in evidence.tries if one.key == key)
        variant = self.store.find(key) or await self._built(parse_recipe(known.recipe))
        found = self._usable(variant)
        if found is None or found.speed is None:
            found = await self._measured(variant, texts=None)
        return replace(_try_of(variant, found, self.order.gate), full=True)

    async def _built(self, recipe: str | Recipe) -> Variant:
        return await built(self.store, self.order.source, self.order.revision, recipe, self._progress)

    async def _measured(self, variant: Variant, texts: int | None) -> Measurement:
        """Raises BuildFailed."""
        backend = registry.for_format(variant.manifest.format).name
        order = replace(
            self._measure_order(backend, texts=texts, context=self._context),
            key=variant.key,
            purpose="evaluation",
            reference="auto",
        )
        if texts is None:
            order = replace(order, quick=False, budget_s=self.order.budget_s)
        child = Order(
            module="server.process.measurer",
            options={"--order": msgspec.json.encode(order).decode()},
            progress=self._progress,
        )
        answer = await run_child(child, Quiet())
        found = read_measurement(variant.path, variant.manifest)
        if answer.error or found is None:
            raise BuildFailed(answer.error.message if answer.error else "a measurement is gone")
        return found

    def _measure_order(self, backend: str, *, texts: int | None, context: int) -> MeasureOrder:
        """On the search's own texts, against a GGUF file, distances only."""
        return MeasureOrder(
            cache=self.order.cache,
            source=self.order.source,
            revision=self.order.revision,
            key="",
            backend=backend,
            context=context,
            parallel=self.order.parallel,
            threads=self.order.threads,
            reference="gguf",
            texts=texts,
            quick=True,
            purpose="search",
        )

    # -- what is told and what is left ------------------------------------------------------------

    @property
    def _progress(self) -> Path:
        return self.store.cache / "searches" / f"{self.source.digest[:16]}.progress"

    def _tell(self, space: Space, evidence: Evidence) -> None:
        done = len(evidence.tries) + len(evidence.probes)
        total = max(done + 1, len(space.presets) // 2 + len(space.groups) + 12)
        self.reporter.progress(Progress("search", done, total, "tries"))

    def _say(self, tried: Try) -> None:
        verdict = "meets the target" if self.order.target.met_by(tried) else "misses the target"
        self.reporter.note(
            f"{tried.variant}: {tried.bytes:,} bytes, {tried.bits_per_weight:.2f} bits a weight, "
            f"mean KL divergence {tried.kl}: {verdict}"
        )

    def _clear(self, evidence: Evidence, winner: Try | None) -> None:
        """Mixtures that did not win are not kept; what was found out of them is."""
        self._progress.unlink(missing_ok=True)
        for one in evidence.tries:
            if one.stage == "mixture" and (winner is None or one.key != winner.key):
                with suppress(UnknownVariant, VariantInUse):
                    self.store.delete(one.key)


async def _answered(asker: Asker, chunk: Chunk, expected: Expected) -> Answered:
    return await asker.answered(chunk, expected.tokens)


def _one(chunk: Chunk, expected: Expected) -> Reference:
    return Reference(Text(chunks=(chunk,), corpus="", tokenizer="", cut=""), (expected,))


def _names(space: Space) -> list[str]:
    return [group.name for group in space.groups]


def _try_of(variant: Variant, found: Measurement, gate: Gate) -> Try:
    manifest, verdict = variant.manifest, judge(found, gate)
    barred = verdict.state == "rejected" and not gate.serve_anyway
    return Try(
        variant=manifest.recipe.name,
        recipe=dict(manifest.recipe.body),
        stage="known",
        key=variant.key,
        bytes=manifest.bytes,
        bits_per_weight=manifest.bits_per_weight,
        kl=found.kl.mean,
        top1=found.top1,
        texts=found.reference.texts,
        full=found.speed is not None,
        rejected="; ".join(verdict.reasons) if barred else "",
    )
