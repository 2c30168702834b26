"""A chat request becomes a Plan: what the model is told, what it must answer, how its answer is read."""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from server.api.generate import Plan, Prompt, sampling_params
from server.api.room import require_room
from server.api.schema.chat import ChatRequest, Effort
from server.errors import RequestError, UnsupportedParameter
from server.pool.states import Lease
from server.text.answer import AnswerReader
from server.text.calls import CallReader, ForcedCalls, FreeCalls
from server.text.model import TextModel
from server.text.reasoning import Marks, ThoughtSplitter
from server.text.tools import (
    call_grammar,
    for_template,
    shown_tokens,
)
from server.types import Grammar, Reasoning

BUDGETS: Mapping[Effort, int | None] = {
    "none": 0,
    "minimal": 128,
    "low": 512,
    "medium": 2048,
    "high": None,
    "xhigh": None,
}


async def plan_chat(body: ChatRequest, id: str, salt: str, grammar: Grammar | None, lease: Lease) -> Plan:
    """`grammar` is what `body.grammar` says. Raises RequestError."""
    text = lease.text
    rendered = await asyncio.to_thread(render, body, text)
    require_room(rendered, lease, "messages")
    prompt = await text.encode_rendered(rendered)
    if body.offered:
        grammar = _with_calls(body, text, grammar)
    marks = text.marks
    begun = marks is not None and rendered.rstrip().endswith(marks.open)
    reads = marks is not None or bool(body.offered)
    plan = Plan(
        id=id,
        prompts=(Prompt(tokens=tuple(prompt)),),
        params=sampling_params(
            body,
            text.sampling,
            max_tokens=body.answer_limit,
            logprobs=body.scored,
            prompt_logprobs=body.prompt_logprobs,
        ),
        candidates=body.n,
        stops=(*body.stop, *(text.default_stops if grammar is None else ())),
        priority=body.priority,
        salt=salt,
        prompt_field="messages",
        grammar=grammar,
        reader=partial(_reader, body, text, begun=begun, bounded=grammar is not None) if reads else None,
        shown=_shown(body, text),
    )
    reasoning = await _reasoning(body, text, begun=begun, bounded=grammar is not None)
    return replace(plan, reasoning=reasoning)


# -- what the model is told -----------------------------------------------------------------------


def render(body: ChatRequest, text: TextModel) -> str:
    """The prompt. Takes up to 2 s: call it in a thread. Raises RequestError."""
    return rendering_of([message.fields for message in body.messages], body, text)


def rendering_of(messages: list[dict[str, Any]], body: ChatRequest, text: TextModel) -> str:
    """As `render`, with these messages in place of the request's."""
    traits, tools = text.template.traits, body.offered
    return text.render(
        for_template(messages, tools, text.tool_format, traits),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message,
        tools=tools if tools and traits.tools else None,
        extra=_variables(body, text),
    )


def _variables(body: ChatRequest, text: TextModel) -> dict[str, Any]:
    """Variables for the template: the effort in its terms, and the client's own."""
    known, effort = text.template.variables, body.reasoning_effort
    ours: dict[str, Any] = {}
    if effort is not None and "reasoning_effort" in known:
        ours["reasoning_effort"] = effort
    if effort is not None and "enable_thinking" in known:
        ours["enable_thinking"] = effort != "none"
    return {**ours, **body.chat_template_kwargs}


# -- what it must answer --------------------------------------------------------------------------


def _with_calls(body: ChatRequest, text: TextModel, grammar: Grammar | None) -> Grammar | None:
    """A forced call; the choice between a call and an answer of the wanted form; or no bound at all.

    `response_format` is of what is said, so that it may come with a forced call, after which nothing is.
    """
    if not body.forces_call and grammar is None:
        return None
    if grammar is not None and body.forces_call and not body.has_format:
        raise RequestError(
            f"{grammar.param}: cannot be combined with a tool_choice that forces a call", param=grammar.param
        )
    if grammar is not None and grammar.kind != "json_schema":
        raise RequestError(f"{grammar.param}: cannot be combined with tools", param=grammar.param)
    instead = None if body.forces_call or grammar is None else grammar.text
    lark = call_grammar(
        text.tool_format.forced, body.offered, text.vocabulary, many=body.many_calls, instead=instead
    )
    return Grammar(kind="lark", text=lark, param="tools")


async def _reasoning(body: ChatRequest, text: TextModel, *, begun: bool, bounded: bool) -> Reasoning | None:
    """Raises UnsupportedParameter for a model without thoughts."""
    budget = _budget(body, text)
    if text.marks is None or (budget is None and not bounded):
        return None
    close_ids = await text.encode(text.marks.close, add_special=False, parse_special=True)
    marks = text.marks
    return Reasoning(
        open=marks.open, close=marks.close, close_ids=tuple(close_ids), begun=begun, budget=budget
    )


def _budget(body: ChatRequest, text: TextModel) -> int | None:
    if text.marks is None:
        if body.reasoning_budget is not None:
            name = body.called("reasoning_budget")
            raise UnsupportedParameter(f"{name}: this model has no thoughts to bound", param=name)
        if body.reasoning_effort not in (None, "none") and "reasoning_effort" not in text.template.variables:
            raise UnsupportedParameter(
                "reasoning_effort: this model does not reason", param="reasoning_effort"
            )
        return None
    if body.reasoning_budget is not None or body.reasoning_effort is None:
        return body.reasoning_budget
    return BUDGETS[body.reasoning_effort]


# -- how it is read -------------------------------------------------------------------------------


def _shown(body: ChatRequest, text: TextModel) -> frozenset[int]:
    """Control tokens that the readers look for."""
    calls = shown_tokens(text.vocabulary) if body.offered else frozenset()
    return calls if text.marks is None else calls | _tokens_of(text.marks, text)


def _tokens_of(marks: Marks, text: TextModel) -> frozenset[int]:
    return shown_tokens(text.vocabulary, (marks.open, marks.close, *marks.tokens))


def _reader(body: ChatRequest, text: TextModel, *, begun: bool, bounded: bool) -> AnswerReader:
    thoughts = None if text.marks is None else ThoughtSplitter(text.marks, begun=begun)
    return AnswerReader(thoughts, _call_reader(body, text, bounded=bounded) if body.offered else None)


def _call_reader(body: ChatRequest, text: TextModel, *, bounded: bool) -> CallReader:
    """`bounded`: by a grammar, which knows the format's own form or that of JSON."""
    format = text.tool_format.forced if bounded else text.tool_format
    if body.forces_call:
        return ForcedCalls(format, new_call_id)
    functions = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in body.offered}
    return FreeCalls(format, functions, new_call_id, many=body.many_calls)


def new_call_id(chars: int) -> str:
    """Some templates take ids of a fixed length only."""
    prefix = "call_" if chars > 16 else ""
    return prefix + secrets.token_hex(chars)[:chars]
