"""An engine as what `quant.measure` compares: it reads texts and says how probable their tokens are.

Everything goes over the wire of requests, so what is measured is what answers: weights, kernels, KV memory.
"""

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

import numpy as np

from quant.measure.score import BEST, KEPT, Answered, Expected, Ids, Singles
from quant.measure.text import Chunk
from server.errors import EngineDied, EngineFailed
from server.process.client import EngineClient
from server.types import Candidates, Generate, SamplingParams, TokenLogprobs, Tokens

Item = TypeVar("Item")
Result = TypeVar("Result")
NEVER = -math.inf


class NotFinite(Exception):
    """The engine computed NaN or infinity."""


class Asker:
    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.at_once = engine.ready.limits.running
        self.context = engine.ready.limits.context
        self._numbers = itertools.count()

    @property
    def pid(self) -> int:
        return self.engine.pid

    async def expected(self, chunk: Chunk, kept: int = KEPT) -> Expected:
        """What a source says of a chunk. Raises NotFinite, ServerErrors."""
        scores = (await self._read(chunk, kept))[chunk.first - 1 :]
        ids = np.array([[token for token, _ in score.top] for score in scores], np.int32)
        logs = np.array([[log for _, log in score.top] for score in scores], np.float64)
        left = 1.0 - np.exp(logs).sum(axis=1)
        everything = ids.shape[1] < kept  # the vocabulary has no more
        rest = np.full(len(left), NEVER) if everything else np.log(np.maximum(left, 1e-12))
        return Expected(
            tokens=ids,
            logs=logs.astype(np.float32),
            rest=rest.astype(np.float32),
            target=np.array([score.logprob for score in scores], np.float32),
            best=ids[:, :BEST],
        )

    async def answered(self, chunk: Chunk, ids: Ids) -> Answered:
        """What a variant says of it: of the tokens [scored, kept] that the source names, and of the rest."""
        wanted = Candidates(chunk.first, ids.shape[1], np.ascontiguousarray(ids, "<i4").tobytes())
        scores = (await self._read(chunk, BEST, wanted))[chunk.first - 1 :]
        logs = np.frombuffer(b"".join(score.candidates for score in scores), "<f4").reshape(len(scores), -1)
        if np.isnan(logs).any():
            raise NotFinite
        return Answered(
            logs=logs[:, :-1],
            rest=logs[:, -1],
            target=np.array([score.logprob for score in scores], np.float32),
            best=np.array([[token for token, _ in score.top] for score in scores], np.int32),
        )

    async def surprise(self, chunk: Chunk) -> Singles:
        """-log p of each scored token."""
        scores = (await self._read(chunk, 0))[chunk.first - 1 :]
        return -np.array([score.logprob for score in scores], np.float32)

    async def write(
        self,
        prompt: Sequence[int],
        most: int,
        *,
        ends: Iterable[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> tuple[int, ...]:
        """An answer with the token that ended it; sampled from the model's own distribution, uncut."""
        params = SamplingParams(
            max_tokens=most,
            temperature=temperature,
            seed=seed,
            reproducible=False,
            stop_ids=tuple(ends),
        )
        tokens: list[int] = []
        async for event in self._events(prompt, params):
            tokens += event.tokens
        return tuple(tokens)

    async def greedy(self, prompt: Sequence[int], most: int, ends: Iterable[int]) -> tuple[int, ...]:
        """An answer without chance; nothing where the prompt leaves no room for one."""
        room = min(most, self.context - len(prompt))
        return await self.write(prompt, room, ends=ends) if room > 0 else ()

    async def all(self, ask: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
        """As many at once as the engine takes; results in order."""
        turn = asyncio.Semaphore(self.at_once)

        async def one(item: Item) -> Result:
            async with turn:
                return await ask(item)

        tasks = [asyncio.create_task(one(item)) for item in items]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _read(
        self, chunk: Chunk, likely: int, wanted: Candidates | None = None
    ) -> tuple[TokenLogprobs, ...]:
        params = SamplingParams(
            max_tokens=0, reproducible=False, prompt_logprobs=likely, prompt_candidates=wanted
        )
        scores: tuple[TokenLogprobs, ...] = ()
        async for event in self._events(chunk.tokens, params):
            scores = scores or event.prompt_logprobs or ()
        if len(scores) != len(chunk.tokens) - 1:
            raise EngineDied("the engine did not score the whole text")
        if not all(math.isfinite(score.logprob) or score.logprob == NEVER for score in scores):
            raise NotFinite
        return scores

    async def _events(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[Tokens]:
        """Prefixes are never shared: each request has a salt of its own."""
        name = f"measure-{next(self._numbers)}"
        request = Generate(id=name, prompt=tuple(prompt), params=params, salt=name)
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    yield event
        except EngineFailed as error:
            raise (NotFinite() if "not finite" in str(error) else error) from error
