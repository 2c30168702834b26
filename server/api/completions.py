"""POST /v1/completions: prompts as text, token ids or lists of either; echo; best_of."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET

from server.api.auth import salt_of
from server.api.body import json_body
from server.api.choice import Scored
from server.api.chunks import CompletionChunks, Envelope, Head
from server.api.deps import Using
from server.api.door import answer_stream, answer_whole, fingerprint, new_id, now
from server.api.generate import (
    Begun,
    Plan,
    Prompt,
    check_tokens,
    sampling_params,
)
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.room import require_room
from server.api.schema.answers import Completion, CompletionChoice
from server.api.schema.completions import CompletionRequest
from server.api.whole import Answer, Whole
from server.pool.states import Lease
from server.text.detokenize import detokenize
from server.text.infill import infill_prompt
from server.types import Grammar

router = APIRouter(tags=["inference"])


@router.post("/v1/completions")
async def completions(
    request: Request,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    services: Using,
) -> Response:
    id, created = new_id("cmpl-"), now()
    grammar = body.grammar(allows_lark=services.settings.lark_grammars)
    plan = partial(_plan, body, id, salt_of(request), grammar)
    if body.stream:
        return await answer_stream(request, services, body, plan, partial(_chunks, body, id, created))
    return await answer_whole(request, services, body, plan, partial(_completion, body, id, created))


async def _plan(body: CompletionRequest, id: str, salt: str, grammar: Grammar | None, lease: Lease) -> Plan:
    text = lease.text
    prompts = await asyncio.gather(*(_prompt(prompt, body, lease) for prompt in body.prompt))
    return Plan(
        id=id,
        prompts=tuple(prompts),
        params=sampling_params(
            body,
            text.sampling,
            max_tokens=body.max_tokens,
            logprobs=0 if body.logprobs is None and body.candidates > body.n else body.logprobs,
            prompt_logprobs=body.scored_prompt,
        ),
        candidates=body.candidates,
        stops=tuple(body.stop),
        priority=body.priority,
        salt=salt,
        grammar=grammar,
    )


async def _prompt(prompt: str | list[int], body: CompletionRequest, lease: Lease) -> Prompt:
    """A text is echoed as it was sent, tokens as what they spell."""
    echo, text = body.echo, lease.text
    if isinstance(prompt, str):
        require_room(prompt, lease, "prompt")
    if body.suffix:
        require_room(body.suffix, lease, "suffix")
        if not isinstance(prompt, str):
            check_tokens(prompt, text, "prompt")
        return Prompt(tokens=tuple(await infill_prompt(prompt, body.suffix, text)))
    if isinstance(prompt, str):
        tokens = await text.encode(prompt, add_special=True, parse_special=True)
        return Prompt(tokens=tuple(tokens), echo=prompt if echo else None)
    check_tokens(prompt, text, "prompt")
    return Prompt(tokens=tuple(prompt), echo=detokenize(text.vocabulary, prompt) if echo else None)


def _chunks(body: CompletionRequest, id: str, created: int, begun: Begun) -> CompletionChunks:
    head = Head(
        id=id,
        object="text_completion",
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(begun.served),
    )
    return CompletionChunks(Envelope(head, wants_usage=body.wants_usage), begun.vocabulary)


def _completion(body: CompletionRequest, id: str, created: int, whole: Whole) -> Completion:
    begun = whole.begun
    return Completion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(begun.served),
        choices=[
            _choice(body, begun, index, answer, prompt)
            for index, (answer, prompt) in enumerate(_kept(body, whole.answers))
        ],
        usage=whole.tally.usage,
    )


def _kept(body: CompletionRequest, answers: Sequence[Answer]) -> list[tuple[Answer, list[Scored]]]:
    """For each prompt the `n` candidates of the greatest mean logprob; and the scores of the prompt."""
    kept: list[tuple[Answer, list[Scored]]] = []
    for start in range(0, len(answers), body.candidates):
        candidates, prompt = answers[start : start + body.candidates], answers[start].prompt
        if body.candidates > body.n:
            candidates = sorted(candidates, key=lambda answer: answer.mean_logprob, reverse=True)
        kept += [(answer, prompt) for answer in candidates[: body.n]]
    return kept


def _choice(
    body: CompletionRequest, begun: Begun, index: int, answer: Answer, prompt: Sequence[Scored]
) -> CompletionChoice:
    shown, asked = [*(prompt if body.echo else ()), *answer.scored], body.prompt_logprobs
    return CompletionChoice(
        index=index,
        text=answer.text,
        logprobs=None
        if body.logprobs is None
        else completion_logprobs(shown, begun.vocabulary, body.logprobs),
        finish_reason=answer.finish,
        prompt_logprobs=UNSET if asked is None else prompt_logprobs(prompt, begun.vocabulary, asked),
    )
