"""What a chat request comes to: prompt, grammar, thoughts, and how the answer is read."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.api.conversation import new_call_id, plan_chat
from server.api.generate import Plan
from server.api.schema.chat import ChatRequest
from server.errors import RequestError
from server.pool.states import Lease
from server.text.model import TextModel
from server.types import ModelText

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = TURNS + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}{# </think> #}"
SWITCH = TURNS + "{{ '</think>' if enable_thinking is defined and not enable_thinking else '' }}"
HERMES = "{% if tools %}{{ tools | tojson }}<tool_call>\n{% endif %}" + TURNS
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TURNS
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
CALLED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "seen"},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


async def planned(template: str, **fields: Any) -> tuple[str, Plan]:
    """The prompt as text, and the plan, for a model that reads bytes as tokens."""

    async def tokenize(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    facts = ModelText(
        pieces=tuple(bytes([byte]) for byte in range(256)),
        control=(),
        chat_template=template,
        bos=None,
        eos=None,
        end_ids=(0,),
        add_bos=False,
    )
    text = TextModel.from_engine(facts, tokenize)
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    )
    body.refuse_unsupported()
    lease = cast(Lease, SimpleNamespace(text=text))
    plan = await plan_chat(body, "id", "", body.grammar(allows_lark=False), lease)
    return bytes(plan.prompts[0].tokens).decode(), plan


async def test_thoughts_that_the_prompt_begins_are_bounded_and_split() -> None:
    _, plan = await planned(THINKING, reasoning_budget=7)
    assert plan.reasoning is not None
    assert (plan.reasoning.begun, plan.reasoning.budget) == (True, 7)
    assert bytes(plan.reasoning.close_ids) == b"</think>"
    assert plan.reader is not None
    parts = plan.reader().push("\nhm</think>\n\nYes", last=True)
    assert (parts.reasoning, parts.text) == ("hm", "Yes")


async def test_a_grammar_waits_for_the_thoughts() -> None:
    _, plan = await planned(THINKING, response_format=FORMAT)
    assert plan.grammar is not None
    assert plan.reasoning is not None
    assert plan.reasoning.budget is None


@pytest.mark.parametrize(("effort", "budget"), [("none", 0), ("low", 512), ("medium", 2048)])
async def test_an_effort_is_a_budget(effort: str, budget: int) -> None:
    prompt, plan = await planned(SWITCH, reasoning_effort=effort)
    assert plan.reasoning is not None
    assert plan.reasoning.budget == budget
    assert prompt.endswith("</think>") == (effort == "none")


async def test_without_a_bound_the_engine_is_told_nothing() -> None:
    _, plan = await planned(THINKING, reasoning_effort="high")
    assert (plan.reasoning, plan.grammar) == (None, None)


async def test_a_template_that_takes_functions_gets_them() -> None:
    prompt, plan = await planned(HERMES, tools=[TOOL], tool_choice="required")
    assert prompt.startswith('[{"type": "function", "function": {"name": "look"')
    assert plan.grammar is not None
    assert plan.grammar.param == "tools"
    assert "<tool_call>" in plan.grammar.text
    free, plan = await planned(HERMES, tools=[TOOL])
    assert (free, plan.grammar) == (prompt, None)


async def test_a_format_without_json_is_forced_in_json() -> None:
    pythonic = "{% if tools %}{{ tools | tojson }}[func_name1(params_name1=1)]\n{% endif %}" + TURNS
    _, plan = await planned(pythonic, tools=[TOOL], tool_choice="required")
    assert plan.grammar is not None
    assert plan.reader is not None
    parts = plan.reader().push('{"name": "look", "arguments": {"a": 1}}', last=True)
    assert parts.calls[0].name == "look"
    prompt, plan = await planned(pythonic, tools=[TOOL], messages=CALLED)
    assert "assistant: [look(a=1)]" in prompt
    assert plan.reader is not None
    parts = plan.reader().push("[look(a=1)]", last=True)
    assert [(call.name, call.arguments) for call in parts.calls] == [("look", '{"a": 1}')]


async def test_another_is_told_in_the_first_message_that_it_takes() -> None:
    system, _ = await planned(TURNS, tools=[TOOL])
    assert system.startswith("system: You can call functions.")
    user, _ = await planned(STRICT, tools=[TOOL])
    assert user.startswith("user: You can call functions.")
    assert user.endswith("\n\nHi\n")


async def test_a_named_function_is_the_only_one_told() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    named = {"type": "function", "function": {"name": "look"}}
    prompt, plan = await planned(TURNS, tools=[TOOL, other], tool_choice=named)
    assert "other" not in prompt
    assert plan.grammar is not None
    assert "other" not in plan.grammar.text


async def test_a_form_and_functions_are_a_choice() -> None:
    _, plan = await planned(TURNS, tools=[TOOL], response_format=FORMAT)
    assert plan.grammar is not None
    assert plan.grammar.kind == "lark"
    assert "answer: %json" in plan.grammar.text
    with pytest.raises(RequestError, match="cannot be combined with tools"):
        await planned(TURNS, tools=[TOOL], guided_choice=["a"])


async def test_stops_of_ours_do_not_cut_an_answer_of_a_given_form() -> None:
    _, plan = await planned(TURNS, response_format=FORMAT, stop="X")
    assert plan.stops == ("X",)


def test_ids_of_calls() -> None:
    assert new_call_id(24).startswith("call_")
    assert len(new_call_id(9)) == 9
    assert new_call_id(9).isalnum()
