"""What variants are held against: the source at its own precision, asked through an engine, once for a text.

Its engine is started only where the shelf lacks something, and ended before anything else is timed.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from msgspec import json
from msgspec.structs import replace

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource, UnsupportedArchitecture
from quant.files import open_regular, replace_synced
from quant.gguf.header import read_header
from quant.measure.score import KEPT, Singles
from quant.measure.score import Reference as Scored
from quant.measure.shards import Answer, ReferenceShelf, Shard
from quant.measure.text import Chunk, Corpus, Text, chunked, halves, windows
from quant.pipeline import build_variant
from quant.plan import base_type
from quant.progress import ignore
from quant.prompts import PromptSet, prompts
from quant.recipe import parse_recipe
from quant.source import Source
from quant.store import VariantStore
from server.process.asking import Asker
from server.process.client import EngineClient
from server.process.orders import MeasureOrder
from server.process.structured import TASKS, TOKENS, prompt_of
from server.text.model import TextModel
from server.types import Open

SHARD = 8  # texts that are computed together
LONGEST_ANSWER = 192  # tokens
GREEDY_TOKENS = 32
GREEDY_PROMPTS = 24
LARGEST_F32 = 4 << 30  # bytes of a float32 GGUF file that is made for this
CUDA = Path("/dev/nvidiactl")
CORPUS_CHUNK = 512  # tokens, as llama.cpp cuts
KEPT_OF_CORPUS = 4 * KEPT  # a text of others' surprises the source: more lies beyond the most probable ones
CORPUS_LIMIT = 8 << 20  # bytes
PERPLEXITY_TOKENS = 4096
SEEDS: Mapping[PromptSet, int] = {"evaluation": 20, "search": 21}  # of texts; the calibration's is another


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of the set, as this model is asked it."""

    number: int
    text: str
    tokens: tuple[int, ...]


class ReferenceMaker:
    """Use it in an `async with` block."""

    def __init__(self, order: MeasureOrder, source: Source, store: VariantStore) -> None:
        self.order, self.source, self.store = order, source, store
        self.label, self._open = _reference_engine(order, source, store)
        corpus = _digest(order.corpus) if order.corpus else None
        self._kept = KEPT_OF_CORPUS if corpus else KEPT
        self._seed = SEEDS[order.purpose]
        what = [source.digest, self.label, corpus or "self", order.context, self._seed, self._kept]
        self.shelf = ReferenceShelf(Path(order.cache), what)
        self._stack = AsyncExitStack()
        self._asker: Asker | None = None
        self._text: TextModel | None = None
        self._prompts: list[Asked] | None = None
        self._corpus: Corpus | None = None

    async def __aenter__(self) -> "ReferenceMaker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.rest()

    @property
    def files(self) -> Path:
        """The source as it was read."""
        return Path(self._open.variant)

    async def rest(self) -> None:
        """End the engine; the next question starts another."""
        self._asker = None
        await self._stack.aclose()

    async def shard(self, number: int) -> Shard | None:
        """Computed if need be; None where the corpus has no more."""
        if (found := self.shelf.shard(number)) is not None:
            return found
        with self.shelf.extending():
            if (found := self.shelf.shard(number)) is None:
                found = await (self._from_corpus(number) if self.order.corpus else self._written(number))
                if found is not None:
                    self.shelf.add(number, found)
        return found

    async def greedy(self) -> tuple[Answer, ...]:
        if not (found := self.shelf.greedy()):
            with self.shelf.extending():
                asker = await self._ask()
                found = tuple(await asker.all(self._greedy, (await self.prompts())[:GREEDY_PROMPTS]))
                self.shelf.add_greedy(found)
        return found

    async def structured(self) -> tuple[Answer, ...]:
        """Answers to the tasks of server.process.structured, as far as their prompts fit."""
        if len(found := self.shelf.structured()) != len(TASKS):
            with self.shelf.extending():
                asker, text = await self._ask(), await self.text()
                asked = [
                    Asked(number, task.prompt, tuple(await prompt_of(task, text)))
                    for number, task in enumerate(TASKS)
                ]
                found = tuple(await asker.all(partial(self._greedy, most=TOKENS), asked))
                self.shelf.add_structured(found)
        return found

    async def surprises(self, texts: dict[str, Text]) -> dict[str, list[Singles]]:
        """The source's -log p of each scored token of each text, by chunks."""
        path = self.shelf.folder / "surprises.json"
        try:
            known = json.decode(path.read_bytes(), type=dict[str, list[list[float]]])
        except (OSError, ValueError):
            known = {}
        if missing := {name: text for name, text in texts.items() if f"{name} {text.digest}" not in known}:
            with self.shelf.extending():
                asker = await self._ask()
                for name, text in missing.items():
                    values = await asker.all(asker.surprise, text.chunks)
                    known[f"{name} {text.digest}"] = [chunk.tolist() for chunk in values]
                replace_synced(path, json.encode(known))
        stored = {name: known[f"{name} {text.digest}"] for name, text in texts.items()}
        return {name: [np.array(chunk, np.float32) for chunk in chunks] for name, chunks in stored.items()}

    async def prompts(self) -> list[Asked]:
        """Those that leave half of the context for an answer, as the model's template puts them."""
        if self._prompts is None:
            text = await self.text()
            most = self.order.context // 2
            found = []
            for number, prompt in enumerate(prompts(self.order.purpose)):
                tokens = await text.encode_chat([{"role": "user", "content": prompt}])
                if 0 < len(tokens) <= most:
                    found.append(Asked(number, prompt, tuple(tokens)))
            if not found:
                raise BadSource("the model's context is too short for any of the bundled prompts")
            self._prompts = found
        return self._prompts

    async def text(self) -> TextModel:
        if self._text is None:
            if self.source.kind == "hf":
                self._text = TextModel.from_folder(self.source.path)
            else:
                engine = (await self._ask()).engine
                assert engine.ready.text is not None, "a GGUF file's engine has its text"
                self._text = TextModel.from_engine(engine.ready.text, engine.tokenize)
        return self._text

    async def corpus(self, shards: Sequence[Shard]) -> Corpus:
        """The text for perplexities: the corpus, or what the source wrote, one after the other."""
        if self.order.corpus:
            whole = await self._corpus_tokens()
            return Corpus(
                tokens=whole.tokens[:PERPLEXITY_TOKENS],
                digest=whole.digest,
                tokenizer=whole.tokenizer,
                begins_with=whole.begins_with,
            )
        chunks = [chunk for shard in shards for chunk in shard.reference.text.chunks]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        return Corpus(
            tokens=tuple(tokens[:PERPLEXITY_TOKENS]),
            digest=shards[0].reference.text.corpus,
            tokenizer=shards[0].reference.text.tokenizer,
            begins_with=await self._begin(),
        )

    # -- texts ------------------------------------------------------------------------------------

    async def _written(self, number: int) -> Shard:
        """Answers to prompts drawn at random, so that texts are independent of each other."""
        asker, asked = await self._ask(), await self.prompts()
        ends = (await self.text()).end_ids
        dice = [random.Random(f"{self._seed} {number * SHARD + place}") for place in range(SHARD)]
        drawn = [(one.choice(asked), one.getrandbits(62)) for one in dice]

        async def answer(draw: tuple[Asked, int]) -> Chunk:
            prompt, seed = draw
            most = min(LONGEST_ANSWER, asker.context - len(prompt.tokens))
            found = await asker.write(prompt.tokens, most, ends=ends, temperature=1.0, seed=seed)
            return Chunk((*prompt.tokens, *found), len(prompt.tokens))

        chunks = await asker.all(answer, drawn)
        text = Text(
            chunks=tuple(chunks),
            corpus=_self_digest(self.order.purpose),
            tokenizer=self._tokenizer(),
            cut="answers, whole",
        )
        return Shard(await self._scored(text), tuple(prompt.number for prompt, _ in drawn))

    async def _from_corpus(self, number: int) -> Shard | None:
        corpus = await self._corpus_tokens()
        whole = halves(corpus, min(CORPUS_CHUNK, self.order.context))
        chunks = whole.chunks[number * SHARD : (number + 1) * SHARD]
        if not chunks:
            return None
        text = Text(chunks=chunks, corpus=whole.corpus, tokenizer=whole.tokenizer, cut=whole.cut)
        return Shard(await self._scored(text), ())

    async def _scored(self, text: Text) -> Scored:
        asker = await self._ask()
        found = await asker.all(lambda chunk: asker.expected(chunk, self._kept), text.chunks)
        return Scored(text, tuple(found))

    async def _greedy(self, asked: Asked, most: int = GREEDY_TOKENS) -> Answer:
        """Nothing, where the prompt leaves no room."""
        asker = await self._ask()
        found = await asker.greedy(asked.tokens, most, (await self.text()).end_ids)
        return Answer(prompt=asked.number, prompt_tokens=asked.tokens, tokens=found)

    async def _corpus_tokens(self) -> Corpus:
        if self._corpus is None:
            assert self.order.corpus is not None
            raw = _read(self.order.corpus)
            words = raw.decode("utf-8")
            tokens = await (await self.text()).encode(words, add_special=False, parse_special=False)
            self._corpus = Corpus(
                tokens=tuple(tokens),
                digest=hashlib.sha256(raw).hexdigest(),
                tokenizer=self._tokenizer(),
                begins_with=await self._begin(),
            )
        return self._corpus

    async def _begin(self) -> int | None:
        text = await self.text()
        return text.bos if text.add_bos else None

    def _tokenizer(self) -> str:
        path = self.source.path / "tokenizer.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else self.source.digest

    # -- the engine -------------------------------------------------------------------------------

    async def _ask(self) -> Asker:
        if self._asker is None:
            engine = await EngineClient.start(self._open)
            self._stack.push_async_callback(engine.stop)
            self._asker = Asker(engine)
        return self._asker


def perplexity_texts(corpus: Corpus, context: int) -> dict[str, Text]:
    """By the names in quant.measure.perplexity; without those that text or context is too short for."""
    wide = min(1024, context)
    ways: dict[str, tuple[int, Callable[[], Text]]] = {
        "ppl_llamacpp": (512, lambda: halves(corpus, 512)),
        "ppl_2048": (2048, lambda: chunked(corpus, 2048)),
        "ppl_window": (wide, lambda: windows(corpus, wide, wide // 2)),
    }
    return {
        name: cut() for name, (size, cut) in ways.items() if size <= context and len(corpus.tokens) >= size
    }


def _reference_engine(order: MeasureOrder, source: Source, store: VariantStore) -> tuple[str, Open]:
    """What it is called, and how it is opened. Both kinds compute in float32 on CPUs; llama.cpp
    starts in a fraction of the time and writes several times faster."""
    base = Open(
        backend="llama",
        variant=str(source.path),
        context=order.context,
        parallel=order.parallel,
        threads=order.threads,
    )
    if source.kind == "gguf":
        return f"gguf {read_header(source.path).file_type}", base
    plain = replace(base, backend="plain")
    if order.reference == "plain" or (order.reference == "auto" and _suits_plain(source)):
        return "plain", plain
    tensors = checkpoint_tensors(source.path).values()
    small = 4 * sum(tensor.elements for tensor in tensors) <= LARGEST_F32
    kind = "f32" if small or order.reference == "gguf" else base_type(tensors)
    try:
        built = build_variant(source, parse_recipe(kind), store, progress=ignore).variant
    except UnsupportedArchitecture:
        if not _has_torch():
            raise
        return "plain", plain
    return f"gguf {kind}", replace(base, variant=str(built.path))


def _suits_plain(source: Source) -> bool:
    """On GPUs, and for checkpoints of which a second copy in float32 would be large."""
    size = sum(tensor.elements for tensor in checkpoint_tensors(source.path).values())
    return _has_torch() and (CUDA.exists() or 4 * size > LARGEST_F32)


def _has_torch() -> bool:
    return find_spec("torch") is not None and find_spec("transformers") is not None


def _self_digest(which: PromptSet) -> str:
    """Of the prompts that start the text."""
    return hashlib.sha256("\0".join(prompts(which)).encode()).hexdigest()


def _digest(path: str) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str) -> bytes:
    """Raises BadSource for what is no UTF-8 text of at most 8 MiB."""
    try:
        with open_regular(Path(path)) as stream:
            raw = stream.read(CORPUS_LIMIT + 1)
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSource(f"{Path(path).name} cannot be read as UTF-8 text") from error
    if len(raw) > CORPUS_LIMIT:
        raise BadSource(f"{Path(path).name} is larger than {CORPUS_LIMIT:,} bytes")
    return raw
