"""From another API's request to the one for chat, and from chat's errors to that API's names."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from server.api.conversation import plan_chat
from server.api.errors import from_validation
from server.api.generate import Plan, Planner
from server.api.schema.chat import ChatRequest
from server.api.schema.sampling import Sampling
from server.errors import RequestError
from server.pool.states import Lease
from server.types import Grammar

Names = Mapping[str, str]  # chat's parameters to the other API's, where they differ


def shared(body: Sampling) -> dict[str, Any]:
    return {name: getattr(body, name) for name in Sampling.model_fields}


def as_chat(fields: Mapping[str, Any], names: Names) -> ChatRequest:
    """Raises RequestError in the other API's words. Fields that are None are left to chat's defaults."""
    try:
        chat = ChatRequest.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
        chat.refuse_unsupported()
    except ValidationError as error:
        raise renamed(from_validation(error), names) from None
    except RequestError as error:
        raise renamed(error, names) from None
    return chat


def planner(chat: ChatRequest, id: str, salt: str, names: Names) -> Planner:
    """Raises RequestError, and so does what it returns: in the other API's words."""
    try:
        grammar = chat.grammar(allows_lark=False)
    except RequestError as error:
        raise renamed(error, names) from None
    if grammar is not None:
        grammar = Grammar(kind=grammar.kind, text=grammar.text, param=names.get(grammar.param, grammar.param))
    return partial(_planned, chat, id, salt, grammar, names)


async def _planned(
    chat: ChatRequest, id: str, salt: str, grammar: Grammar | None, names: Names, lease: Lease
) -> Plan:
    try:
        plan = await plan_chat(chat, id, salt, grammar, lease)
    except RequestError as error:
        raise renamed(error, names) from None
    return replace(plan, prompt_field=names.get(plan.prompt_field, plan.prompt_field))


def renamed(error: RequestError, names: Names) -> RequestError:
    """The same error about the parameter that the client knows. Places within it are chat's, and left out."""
    param = error.param or ""
    root = param.partition("[")[0].partition(".")[0]
    if root not in names:
        return error
    text = str(error)
    if text.startswith(f"{param}: "):
        text = names[root] + text[len(param) :]
    return type(error)(text, param=names[root])
