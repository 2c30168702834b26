"""From a checked request to engine requests, and their event streams merged into one.

Every door (chat, completions, ...) makes a Plan and formats the parts that come back.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from msgspec.structs import replace as replace_struct

from server.api.choice import Choice, Delta, Scored, understood
from server.api.deps import Services
from server.api.leaving import cancelled
from server.api.meters import Meter
from server.api.schema.answers import PromptDetails, Usage
from server.api.schema.sampling import Sampling
from server.api.share import Share
from server.errors import ContextTooLong, EngineDied, Overloaded, RequestError
from server.pool.states import Lease, Served
from server.pool.uses import NONE, Use
from server.process.inbox import one_by_one
from server.text.answer import AnswerReader
from server.text.model import Sampling as Recommended
from server.text.model import TextModel
from server.text.vocabulary import Vocabulary
from server.types import Generate, Grammar, Reasoning, SamplingParams, Tokens

Number = TypeVar("Number", int, float)
SEED_BITS = 63
UNSENT = 64  # deltas of a request's answers that may wait for the client
QUEUE_RETRY_S = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    tokens: tuple[int, ...]
    echo: str | None = None  # shown before each answer, with its scores if there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams  # max_tokens is cut to the room of each prompt, the seed set for each answer
    candidates: int = 1  # answers to each prompt
    stops: tuple[str, ...] = ()
    priority: int = 0
    salt: str = ""
    prompt_field: str = "prompt"  # the parameter to blame for a prompt that is too long
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None
    reader: Callable[[], AnswerReader] | None = None  # of each answer; None: all of it is text
    shown: frozenset[int] = frozenset()  # control tokens that the reader needs to see


@dataclass(frozen=True, slots=True)
class Begun:
    served: Served
    vocabulary: Vocabulary
    prompt: int = 0  # tokens
    cached: int = 0  # of them, of the answer that began first


@dataclass(slots=True)
class Tally:
    """Tokens of a whole request, complete when its last delta is out."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0  # of the completion's

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            total_tokens=self.prompt + self.completion,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached),
        )


Planner = Callable[[Lease], Awaitable[Plan]]
Part = Begun | Delta | Tally  # in this order: one Begun, deltas, one Tally


def sampling_params(
    body: Sampling,
    recommended: Recommended,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Without a temperature the model's authors choose; with one the request is taken literally."""
    advice = recommended if body.temperature is None else Recommended()
    return SamplingParams(
        max_tokens=2**31 - 1 if max_tokens is None else min(max_tokens, 2**31 - 1),
        temperature=_first(body.temperature, advice.temperature, 1.0),
        top_p=_first(body.top_p, advice.top_p, 1.0),
        top_k=max(0, _first(body.top_k, advice.top_k, 0)),
        min_p=_first(body.min_p, advice.min_p, 0.0),
        seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed % 2**SEED_BITS,
        reproducible=body.seed is not None,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=_first(body.repetition_penalty, advice.repetition_penalty, 1.0),
        logit_bias=tuple((int(token), bias) for token, bias in body.logit_bias.items()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_ids=tuple(body.stop_token_ids),
    )


def _first(asked: Number | None, advised: Number | None, standard: Number) -> Number:
    if asked is not None:
        return asked
    return standard if advised is None else advised


async def ask(services: Services, name: str, plan: Planner, *, wait_s: float | None) -> AsyncGenerator[Part]:
    """Acquire the model, plan, run. Closing it aborts whatever runs. Raises ServerErrors.

    Where the engine dies before anything was generated, another one answers: the client need not know.
    """
    with Meter(services.metrics) as meter:
        try:
            async with aclosing(_attempt(services, name, plan, wait_s, meter)) as parts:
                async for part in parts:
                    yield part
        except _DiedUnstarted:
            meter.again()
            async with aclosing(_attempt(services, name, plan, wait_s, meter)) as parts:
                async for part in parts:
                    yield part


class _DiedUnstarted(EngineDied):
    """No part was given out yet."""


async def _attempt(
    services: Services, name: str, plan: Planner, wait_s: float | None, meter: Meter
) -> AsyncGenerator[Part]:
    async with _acquired(services, name, plan, wait_s) as (lease, planned):
        requests = _requests(planned, lease)
        refuse_when_full(lease, services.settings.queue_limit)  # others came while the plan was made
        tally = Tally(prompt=sum(len(prompt.tokens) for prompt in planned.prompts))
        meter.begin(lease.variant, tally.prompt)
        runs = [_run(lease, planned, request, index, tally, meter) for index, request in enumerate(requests)]
        begun = False
        try:
            async with aclosing(_merged(runs, Share(lease))) as deltas:
                async for delta in deltas:
                    if not begun:
                        begun = True
                        yield Begun(lease.variant, lease.text.vocabulary, tally.prompt, tally.cached)
                    yield delta
        except EngineDied as error:
            if begun:
                raise
            raise _DiedUnstarted(str(error)) from error
        yield tally


@asynccontextmanager
async def _acquired(
    services: Services, name: str, planner: Planner, wait_s: float | None
) -> AsyncIterator[tuple[Lease, Plan]]:
    """Only a plan tells what it asks of an engine. Where that has no memory for it, the plan is made again on
    one that has."""
    uses = NONE
    while True:
        async with services.pool.acquire(name, wait_s=wait_s, uses=uses) as lease:
            refuse_when_full(lease, services.settings.queue_limit)  # before anything is rendered or tokenized
            plan = await planner(lease)
            uses |= _uses(plan)
            if uses <= lease.uses:
                yield lease, plan
                return


def _uses(plan: Plan) -> frozenset[Use]:
    found: dict[Use, bool] = {
        "grammar": plan.grammar is not None,
        "scores": plan.params.prompt_logprobs is not None,
    }
    return frozenset(use for use, asked in found.items() if asked)


def _requests(plan: Plan, lease: Lease) -> list[Generate]:
    """One for each candidate of each prompt. Raises RequestError."""
    text, context = lease.text, lease.engine.ready.limits.context
    for token, _ in plan.params.logit_bias:
        _check_token(token, text, "logit_bias")
    for token in plan.params.stop_ids:
        _check_token(token, text, "stop_token_ids")
    stop_ids = tuple({*plan.params.stop_ids, *text.end_ids})
    return [
        Generate(
            id=f"{plan.id}-{number}-{candidate}",
            prompt=prompt.tokens,
            params=replace_struct(
                plan.params,
                max_tokens=min(plan.params.max_tokens, _room(prompt, context, plan)),
                prompt_logprobs=None if candidate and prompt.echo is None else plan.params.prompt_logprobs,
                seed=(plan.params.seed + candidate) % 2**SEED_BITS,
                stop_ids=stop_ids,
            ),
            salt=plan.salt,
            priority=plan.priority,
            place=number * plan.candidates + candidate,
            grammar=plan.grammar,
            reasoning=plan.reasoning,
        )
        for number, prompt in enumerate(plan.prompts)
        for candidate in range(plan.candidates)
    ]


def _room(prompt: Prompt, context: int, plan: Plan) -> int:
    """Tokens that the answer may have. Raises RequestError."""
    size = len(prompt.tokens)
    if not size:
        raise RequestError(f"{plan.prompt_field}: must hold at least one token", param=plan.prompt_field)
    if size + min(1, plan.params.max_tokens) > context:
        raise ContextTooLong(
            f"{plan.prompt_field}: the context is {context} tokens, prompt and answer together; "
            f"the prompt has {size}",
            param=plan.prompt_field,
        )
    return context - size


def check_tokens(tokens: Sequence[int], text: TextModel, param: str) -> None:
    """Raises RequestError for one that the model does not have."""
    for token in tokens:
        _check_token(token, text, param)


def _check_token(token: int, text: TextModel, param: str) -> None:
    if not 0 <= token < text.vocab_size:
        raise RequestError(f"{param}: token ids of this model are 0 to {text.vocab_size - 1}", param=param)


def refuse_when_full(lease: Lease, queue_limit: int) -> None:
    """A request of many sequences is let in whole: those beyond its share wait outside the queue."""
    queued = lease.engine.requests - lease.engine.ready.limits.running
    if queued >= queue_limit:
        raise Overloaded("too many requests are waiting for this model", retry_after=QUEUE_RETRY_S)


async def _run(
    lease: Lease, plan: Plan, request: Generate, index: int, tally: Tally, meter: Meter
) -> AsyncGenerator[Delta]:
    """One answer. Leaving early, at a stop string, aborts the engine's request."""
    number, candidate = divmod(index, plan.candidates)
    choice = Choice(index, lease.text.detokenizer(begins=False, shown=plan.shown), plan.stops)
    reader = None if plan.reader is None else plan.reader()
    first = True
    with meter.sequence() as timer:
        async with aclosing(lease.engine.generate(request)) as events:
            async for together in events:
                timer.tokens(len(together.tokens))
                # a token at a time for those who tell thoughts from answers, and count both
                for event in (together,) if reader is None else one_by_one(together):
                    before = choice.tokens
                    delta = choice.push(event)
                    new = choice.tokens - before
                    tally.completion += new
                    if first:
                        first = False
                        timer.waited(event.waited_s)
                        tally.cached += 0 if candidate else event.cached_tokens or 0
                        delta = _with_prompt(delta, plan.prompts[number], event, lease.text)
                    if reader is not None:
                        delta = understood(delta, reader)
                        tally.reasoning += new if delta.reasoning or reader.thinking else 0
                    timer.finish = delta.finish
                    yield delta
                    if delta.finish:
                        return


def _with_prompt(delta: Delta, prompt: Prompt, event: Tokens, text: TextModel) -> Delta:
    """The first delta of an answer, with what it says of its prompt: the text, the scores, or neither."""
    scored: tuple[Scored, ...] = ()
    if event.prompt_logprobs is not None:
        detokenizer = text.detokenizer()
        scores = (None, *event.prompt_logprobs)
        scored = tuple(
            Scored(token, detokenizer.push((token,)), score)
            for token, score in zip(prompt.tokens, scores, strict=True)
        )
    return replace(delta, text=(prompt.echo or "") + delta.text, prompt=scored)


async def _merged(runs: list[AsyncGenerator[Delta]], share: Share) -> AsyncGenerator[Delta]:
    """Deltas of all runs as they come, a share of them at a time. The first error ends all of them."""
    if len(runs) == 1:
        async with aclosing(runs[0]) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(UNSENT)
    tasks = [asyncio.create_task(_pour(run, queue, share)) for run in runs]
    try:
        left = len(tasks)
        while left:
            match await queue.get():
                case None:
                    left -= 1
                case Exception() as error:
                    raise error
                case delta:
                    yield delta
    finally:
        await cancelled(*tasks)


async def _pour(
    run: AsyncGenerator[Delta], queue: "asyncio.Queue[Delta | Exception | None]", share: Share
) -> None:
    await share.enter()
    try:
        async with aclosing(run) as deltas:
            async for delta in deltas:
                await queue.put(delta)
    except Exception as error:  # noqa: BLE001 - raised again by the one who reads the queue
        await queue.put(error)
    else:
        share.leave()
        await queue.put(None)
