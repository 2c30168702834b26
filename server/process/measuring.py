"""How one variant is measured: its engine is asked what the source was asked, text after text, until the
error is small enough or the time is up.
"""

import asyncio
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec.structs import replace

from quant.building import versions
from quant.measure.estimate import mean, mean_difference, mean_divergence
from quant.measure.figures import (
    by_text,
    divergence_of,
    ends_in_a_loop,
    figure,
    greedy_of,
    joined,
    perplexity,
    ratio,
)
from quant.measure.gate import nominal_bits
from quant.measure.measurement import (
    Block,
    Greedy,
    Health,
    Measurement,
    Perplexity,
    Reference,
    Rounding,
    Speed,
    Structured,
    Worst,
    files_digest,
)
from quant.measure.score import BEST, SMALLEST, Answered, Comparison, Expected, compare_answers
from quant.measure.shards import Answer, Shard
from quant.measure.shards import joined as joined_references
from quant.measure.text import Chunk
from quant.progress import Progress, Report, Stage
from quant.source import Source
from quant.store import Variant
from server.process.asking import Asker, NotFinite
from server.process.client import EngineClient
from server.process.orders import MeasureOrder
from server.process.reference import GREEDY_TOKENS, SHARD, ReferenceMaker, perplexity_texts
from server.process.structured import TASKS, TOKENS, is_valid, rates
from server.text.tools import shown_tokens
from server.types import Open

SMALL_ERROR = 0.05  # of the mean divergence: then more text is not needed
FEWEST_SHARDS, MOST_SHARDS, QUICK_SHARDS = 6, 48, 3
WORST = 5
PACKAGES = ("llama-cpp-python", "numpy", "torch", "transformers")
KINDS = {
    "self": "answers that the source wrote to bundled prompts, at temperature 1",
    "corpus": "a given text, second halves of chunks",
}


@dataclass(kw_only=True)
class Measuring:
    """One variant. Called in threads: `compared` first, for the matrices beside the source's; `blocks` at the
    end, for the error behind each decoder block."""

    order: MeasureOrder
    source: Source
    variant: Variant
    maker: ReferenceMaker
    report: Report
    blocks: Callable[[Sequence[int]], tuple[Block, ...]]
    compared: Callable[[], Rounding | None]
    shards: list[Shard] = field(default_factory=list)
    parts: list[Comparison] = field(default_factory=list)
    strange: Callable[[], tuple[str, ...]] = tuple
    rounding: Rounding | None = None
    strangers: tuple[str, ...] = ()
    finite: bool = True
    complete: bool = False
    began: float = field(default_factory=time.monotonic)
    load_s: float = 0.0

    async def run(self, save: Callable[[Measurement], None]) -> Measurement:
        """`save` is called with what is known so far, whenever that is more than before."""
        async with AsyncExitStack() as stack:
            await self._prepare()
            self.strangers = await asyncio.to_thread(self.strange)
            self.rounding = await asyncio.to_thread(self.compared)
            asker = await self._start(stack)
            await self._distances(asker, save)
            found = self._measurement()
            if self.order.quick:
                return found
            return await self._more(asker, found)

    async def _prepare(self) -> None:
        """What the source has to say first, before two engines share the machine."""
        for number in range(1 if self.order.quick else self._fewest):
            self._tell("reference", number, self._fewest)
            if await self.maker.shard(number) is None:
                break
        if not self.order.quick:
            await self.maker.greedy()
        await self.maker.rest()

    @property
    def _fewest(self) -> int:
        return min(FEWEST_SHARDS, self._most)

    @property
    def _most(self) -> int:
        if self.order.texts is not None:
            return max(1, math.ceil(self.order.texts / SHARD))
        return QUICK_SHARDS if self.order.quick else MOST_SHARDS

    async def _start(self, stack: AsyncExitStack) -> Asker:
        order, began = self.order, time.monotonic()
        engine = await EngineClient.start(
            Open(
                backend=order.backend,
                variant=str(self.variant.path),
                context=order.context,
                parallel=order.parallel,
                threads=order.threads,
            )
        )
        stack.push_async_callback(engine.stop)
        self.load_s = time.monotonic() - began
        return Asker(engine)

    # -- distances --------------------------------------------------------------------------------

    async def _distances(self, asker: Asker, save: Callable[[Measurement], None]) -> None:
        while not self.complete:
            number = len(self.parts)
            self._tell("measure", number, self._most)
            shard = await self.maker.shard(number) if number < self._most else None
            if shard is None:
                self.complete = not self.order.quick or self.order.texts is not None
                break
            await self._compare(asker, shard)
            self.complete = self._is_enough()
            save(self._measurement())
            if self._is_late():
                break
        await self.maker.rest()

    async def _compare(self, asker: Asker, shard: Shard) -> None:
        async def answer(pair: tuple[Chunk, Expected]) -> Answered:
            try:
                return await asker.answered(pair[0], pair[1].tokens)
            except NotFinite:
                self.finite = False
                return _nothing(pair[1])

        source = shard.reference
        answers = await asker.all(answer, zip(source.text.chunks, source.chunks, strict=True))
        self.shards.append(shard)
        self.parts.append(compare_answers(answers, source))

    def _is_enough(self) -> bool:
        if not self.finite:
            return True
        if self.order.texts is not None or len(self.parts) < self._fewest:
            return False
        found = mean_divergence([chunk for part in self.parts for chunk in part.divergence])
        return found.error <= SMALL_ERROR * found.value

    def _is_late(self) -> bool:
        budget = self.order.budget_s
        return budget is not None and time.monotonic() - self.began > budget

    def _measurement(self) -> Measurement:
        source, found = joined_references([shard.reference for shard in self.shards]), joined(self.parts)
        manifest = self.variant.manifest
        change = mean_difference(found.surprise, found.source_surprise)
        kind: Literal["self", "corpus"] = "corpus" if self.order.corpus else "self"
        return Measurement(
            key=self.variant.key,
            files=files_digest(manifest),
            variant=manifest.recipe.name,
            bits=nominal_bits(manifest.recipe.body, manifest.bits_per_weight),
            bits_per_weight=manifest.bits_per_weight,
            bytes=manifest.bytes,
            reference=Reference(
                source=self.source.digest,
                engine=self.maker.label,
                text=source.text.digest,
                kind=kind,
                about=KINDS[kind],
                texts=len(source.chunks),
                tokens=source.text.scored,
                kept=source.chunks[0].tokens.shape[1],
            ),
            backend=self.order.backend,
            context=self.order.context,
            complete=self.complete,
            finite=self.finite,
            kl=divergence_of(found, source),
            top1=figure(mean(found.agrees)),
            top5=figure(mean(found.overlap)),
            ln_ppl=figure(mean(found.surprise)),
            ln_ppl_change=figure(change),
            ppl_ratio=ratio(change),
            texts=by_text(found),
            rounding=self.rounding,
            strange=self.strangers,
            machine=machine(),
            versions=versions(*PACKAGES),
            taken=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 1),
        )

    # -- everything else --------------------------------------------------------------------------

    async def _more(self, asker: Asker, found: Measurement) -> Measurement:
        if not self.finite:
            return found
        sources = await self.maker.greedy()
        self._tell("answers", 0, 1)
        ours = await asker.all(lambda answer: self._greedy(asker, answer), sources)
        greedy, health = _greedy_figures(ours, sources)
        structured = await self._structured(asker)
        perplexities = await self._perplexities(asker)
        worst = await self._worst(sources, ours)
        await self.maker.rest()
        self._tell("speed", 0, 1)
        speed = await self._speed(asker)
        await asker.engine.stop()
        self._tell("blocks", 0, 1)
        longest = max((chunk.tokens for chunk in self.shards[0].reference.text.chunks), key=len)
        blocks = await asyncio.to_thread(self.blocks, longest)
        return replace(
            found,
            perplexities=perplexities,
            greedy=greedy,
            health=health,
            structured=structured,
            speed=speed,
            blocks=blocks,
            worst=worst,
            seconds=round(time.monotonic() - self.began, 1),
        )

    async def _greedy(self, asker: Asker, answer: Answer, most: int = GREEDY_TOKENS) -> tuple[int, ...]:
        return await asker.greedy(answer.prompt_tokens, most, (await self.maker.text()).end_ids)

    async def _structured(self, asker: Asker) -> Structured:
        sources = await self.maker.structured()
        ours = await asker.all(lambda answer: self._greedy(asker, answer, TOKENS), sources)
        mine, theirs = [await self._rates(one) for one in (ours, [answer.tokens for answer in sources])]
        return Structured(
            answers=len(TASKS) // 2,
            json=mine[0],
            source_json=theirs[0],
            calls=mine[1],
            source_calls=theirs[1],
        )

    async def _rates(self, answers: Sequence[Sequence[int]]) -> tuple[float, float]:
        text, valid = await self.maker.text(), []
        for task, tokens in zip(TASKS, answers, strict=True):
            decoder = text.detokenizer(shown=shown_tokens(text.vocabulary))
            answer = decoder.push(tuple(tokens)) + decoder.flush()
            valid.append(is_valid(task, answer, text))
        return rates(valid)

    async def _perplexities(self, asker: Asker) -> tuple[Perplexity, ...]:
        self._tell("perplexity", 0, 1)
        texts = perplexity_texts(await self.maker.corpus(self.shards), self.order.context)
        sources = await self.maker.surprises(texts)
        ours = {name: await asker.all(asker.surprise, text.chunks) for name, text in texts.items()}
        return tuple(perplexity(name, text, ours[name], sources[name]) for name, text in texts.items())

    async def _worst(self, sources: Sequence[Answer], ours: Sequence[tuple[int, ...]]) -> tuple[Worst, ...]:
        """The prompts whose texts are furthest from the source, with both greedy answers."""
        totals: dict[int, tuple[float, int]] = {}
        for shard, part in zip(self.shards, self.parts, strict=True):
            for prompt, values in zip(shard.prompts, part.divergence, strict=False):
                total, count = totals.get(prompt, (0.0, 0))
                totals[prompt] = (total + float(values.sum()), count + len(values))
        means = {prompt: total / count for prompt, (total, count) in totals.items()}
        known = {answer.prompt: (answer, own) for answer, own in zip(sources, ours, strict=True)}
        order = sorted((prompt for prompt in means if prompt in known), key=lambda one: -means[one])
        texts = {asked.number: asked.text for asked in await self.maker.prompts()} if order else {}
        return tuple([await self._as_worst(means[one], texts[one], *known[one]) for one in order[:WORST]])

    async def _as_worst(self, kl: float, prompt: str, answer: Answer, own: Sequence[int]) -> Worst:
        return Worst(
            kl=round(kl, 5),
            prompt=prompt,
            source=await self._decoded(answer.tokens),
            variant=await self._decoded(own),
        )

    async def _decoded(self, tokens: Sequence[int]) -> str:
        decoder = (await self.maker.text()).detokenizer()
        return decoder.push(tuple(tokens)) + decoder.flush()

    async def _speed(self, asker: Asker) -> Speed:
        """Prompts of half a context, answers of 48 tokens. Stops count for nothing: nothing is read."""
        tokens = [
            token for shard in self.shards for chunk in shard.reference.text.chunks for token in chunk.tokens
        ]
        size = max(8, min(512, self.order.context // 2, len(tokens) // 8))
        answer = max(1, min(48, self.order.context - size - 1))
        prompts = [tuple(tokens[at * size : (at + 1) * size]) for at in range(8)]
        one = await _timed(asker, prompts[:1], answer)
        eight = await _timed(asker, prompts, answer)
        return Speed(
            load_s=round(self.load_s, 3),
            memory_bytes=resident(asker.pid),
            prefill_1=one[0],
            decode_1=one[1],
            prefill_8=eight[0],
            decode_8=eight[1],
        )

    def _tell(self, stage: Stage, done: int, total: int) -> None:
        self.report(Progress(stage, done, total, "groups of texts" if total > 1 else ""))


async def _timed(asker: Asker, prompts: Sequence[tuple[int, ...]], answer: int) -> tuple[float, float]:
    """(prompt tokens, answer tokens) a second, of all prompts together."""
    began = time.monotonic()
    await asyncio.gather(*(asker.write(prompt, 1) for prompt in prompts))
    filled = time.monotonic() - began
    began = time.monotonic()
    await asyncio.gather(*(asker.write(prompt[:8], answer) for prompt in prompts))
    decoded = time.monotonic() - began
    prompt_tokens = sum(map(len, prompts))
    return round(prompt_tokens / filled, 1), round(answer * len(prompts) / decoded, 1)


def _greedy_figures(ours: Sequence[Sequence[int]], sources: Sequence[Answer]) -> tuple[Greedy, Health]:
    theirs = [answer.tokens for answer in sources]
    loops = [sum(map(ends_in_a_loop, answers)) / len(answers) for answers in (ours, theirs)]
    greedy = greedy_of(list(zip(ours, theirs, strict=True)), GREEDY_TOKENS)
    return greedy, Health(loops=loops[0], source_loops=loops[1])


def _nothing(expected: Expected) -> Answered:
    """Of a model that computes no numbers: every token is as good as impossible."""
    impossible = np.full_like(expected.logs, SMALLEST)
    rows = len(impossible)
    return Answered(
        logs=impossible,
        rest=np.full(rows, SMALLEST, np.float32),
        target=np.full(rows, SMALLEST, np.float32),
        best=np.full((rows, BEST), -1, np.int32),
    )


def resident(pid: int) -> int:
    """Bytes of memory that a process holds, mapped files that are in memory included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    """The processor's name and how many of its cores we may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
