"""Answers that must be what was asked for, over HTTP, from a real engine process with the toy in it."""

import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import validate

from tests.server.api.support import (
    CHAT,
    COMPLETIONS,
    application,
    chat,
    client,
    completion,
    error_of,
    events,
)
from tests.server.pool.support import toy, write_gguf

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "days_off": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days", "days_off"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "trip", "strict": True, "schema": SCHEMA}}
NO_TOOL = {"type": "function", "function": {"name": "x"}}
CROSSED = {"type": "integer", "minimum": 3, "maximum": 1}
NAMED_ODDLY = {"type": "json_schema", "json_schema": {"name": "a trip", "schema": SCHEMA}}
NAMED_LONG = {"type": "json_schema", "json_schema": {"name": "a" * 65, "schema": SCHEMA}}
LIST_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
TOOL = {"type": "function", "function": {"name": "plan_trip", "description": "Plans", "parameters": SCHEMA}}
PLAIN = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    model = toy(write_gguf(tmp_path / "toy.gguf", context=4096), context=4096, parallel=4)
    async with application(tmp_path, model) as app, client(app) as http:
        yield http


async def ask(http: httpx.AsyncClient, **fields: Any) -> Any:
    response = await http.post(CHAT, json=chat(max_tokens=400, **fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def stream(http: httpx.AsyncClient, **fields: Any) -> list[Any]:
    response = await http.post(CHAT, json=chat(max_tokens=400, stream=True, **fields))
    return [chunk["choices"][0] for chunk in events(response.text)]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
async def test_a_schema_is_followed(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    for seed in range(3):
        choice = await ask(http, temperature=1, seed=seed, **fields)
        assert choice["finish_reason"] == "stop"
        validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"regex": "ab?"}, "ab?"),
        ({"structured_outputs": {"regex": "x{4}"}}, "x{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["up", "down"]}}, "up|down"),
    ],
)
async def test_expressions_and_choices_are_followed(
    http: httpx.AsyncClient, fields: dict[str, Any], expected: str
) -> None:
    choice = await ask(http, **fields)
    assert re.fullmatch(expected, choice["message"]["content"])
    text = (await http.post(COMPLETIONS, json=completion(max_tokens=50, **fields))).json()["choices"][0][
        "text"
    ]
    assert re.fullmatch(expected, text)


async def test_streamed_and_whole_are_the_same_and_count_the_same(http: httpx.AsyncClient) -> None:
    whole = await ask(http, response_format=FORMAT)
    chunks = await stream(http, response_format=FORMAT)
    assert "".join(one["delta"].get("content") or "" for one in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == "stop"


async def test_a_limit_may_cut_an_answer(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat(max_tokens=5, response_format=FORMAT))
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["content"]) == 5


async def test_an_object_of_any_kind(http: httpx.AsyncClient) -> None:
    choice = await ask(http, response_format={"type": "json_object"})
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"response_format": 7}, "response_format", "dictionary"),
        ({"guided_json": "{"}, "guided_json", "JSON schema"),
        ({"guided_json": {"not": {}}}, "guided_json", "keyword not"),
        ({"guided_json": {"type": "nosuch"}}, "guided_json", "type: must be the name"),
        ({"guided_json": {"minimum": "5"}}, "guided_json", "minimum: must be a number"),
        ({"guided_json": {"pattern": "$a|b"}}, "guided_json", "(pattern) cannot be used: ^ and $ can only"),
        ({"guided_json": {"type": "string", "pattern": "a$b"}}, "guided_json", "^ and $ can only stand"),
        ({"guided_regex": "$a|b"}, "guided_regex", "^ and $ can only stand"),
        ({"guided_json": {"$ref": "#none"}}, "guided_json", "keyword $ref must point to a part"),
        ({"guided_json": CROSSED}, "guided_json", "minimum is greater than maximum"),
        ({"response_format": NAMED_ODDLY}, "response_format.json_schema.name", "[A-Za-z0-9_-]{1,64}"),
        ({"response_format": NAMED_LONG}, "response_format.json_schema.name", "[A-Za-z0-9_-]{1,64}"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "1 item"),
        (
            {"guided_choice": ["a"], "guided_regex": "a"},
            "guided_choice",
            "guided_regex and guided_choice: only",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "structured_outputs.regex and structured_outputs.choice: only",
        ),
        ({"guided_grammar": "start: X"}, "guided_grammar", "switched off"),
        ({"structured_outputs": {"grammar": "start: X"}}, "structured_outputs", "switched off"),
        ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex", "tools"),
        *(
            ({"tools": [TOOL], "tool_choice": choice, **bound}, next(iter(bound)), "forces a call")
            for choice in ("required", {"type": "function", "function": {"name": "plan_trip"}})
            for bound in (
                {"guided_regex": "a"},
                {"guided_choice": ["a"]},
                {"guided_json": SCHEMA},
                {"structured_outputs": {"json_object": True}},
            )
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "name of its own"),
        ({"tools": [TOOL], "tool_choice": NO_TOOL}, "tool_choice", "no such"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [LIST_TOOL]}, "tools", "object"),
        ({"reasoning_budget": 5}, "reasoning_budget", "no thoughts"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not reason"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", "false"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "cannot be set"),
    ],
)
async def test_what_cannot_be_done_is_named(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str, word: str
) -> None:
    response = await http.post(CHAT, json=chat(**fields))
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert word in error["message"]


async def test_a_suffix_needs_a_model_with_its_tokens(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, json=completion(suffix="x"))
    assert (response.status_code, error_of(response)["param"]) == (400, "suffix")


# -- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "plan_trip"}}])
async def test_a_forced_call_is_a_call(http: httpx.AsyncClient, choice: Any) -> None:
    for seed in range(3):
        answer = await ask(http, tools=[TOOL], tool_choice=choice, temperature=1, seed=seed)
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        [call] = answer["message"]["tool_calls"]
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"]["name"] == "plan_trip"
        validate(json.loads(call["function"]["arguments"]), SCHEMA)


async def test_a_form_beside_a_forced_call_is_said_to_have_no_effect(http: httpx.AsyncClient) -> None:
    """OpenAI takes both: a call says nothing that could have the form."""
    forced: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 400}
    response = await http.post(CHAT, json=chat(**forced, response_format=FORMAT))
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert response.headers["x-ignored-params"] == "response_format"
    free = await http.post(CHAT, json=chat(**(forced | {"tool_choice": "auto"}), response_format=FORMAT))
    assert (free.status_code, "x-ignored-params" in free.headers) == (200, False)


async def test_a_call_that_a_stop_text_cuts_is_not_said_to_be_one(http: httpx.AsyncClient) -> None:
    wanted: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "stop": ["ity"]}
    answer = await ask(http, **wanted)
    [call] = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "stop"
    assert call["function"]["arguments"].endswith("c")
    assert [one["finish_reason"] for one in await stream(http, **wanted)][-1] == "stop"


async def test_a_streamed_call_comes_in_pieces(http: httpx.AsyncClient) -> None:
    whole = await ask(http, tools=[TOOL, PLAIN], tool_choice="required")
    chunks = await stream(http, tools=[TOOL, PLAIN], tool_choice="required")
    deltas = [call for one in chunks for call in one["delta"].get("tool_calls", ())]
    assert [delta["index"] for delta in deltas] == [0] * len(deltas)
    first, *rest = deltas
    assert first["id"]
    assert (first["type"], first["function"]["arguments"]) == ("function", "")
    assert all(
        set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"} for delta in rest
    )
    [call] = whole["message"]["tool_calls"]
    assert first["function"]["name"] == call["function"]["name"]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    assert not any(one["delta"].get("content") for one in chunks)
    assert [one["finish_reason"] for one in chunks][-1] == "tool_calls"


async def test_calls_are_not_made_where_none_is_wanted(http: httpx.AsyncClient) -> None:
    with_tools = await ask(http, tools=[TOOL], tool_choice="none", n=1)
    assert "tool_calls" not in with_tools["message"]
    free = await ask(http, tools=[TOOL])
    assert isinstance(free["message"]["content"], str)


async def test_history_may_hold_calls_and_results(http: httpx.AsyncClient) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    assert (await ask(http, messages=messages, tools=[PLAIN]))["message"]["role"] == "assistant"


async def test_an_answer_goes_on_where_the_last_message_ends(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Once upon"}]
    ended = await http.post(CHAT, json=chat(messages=messages))
    going_on = await http.post(CHAT, json=chat(messages=messages, continue_final_message=True))
    used = [answer.json()["usage"]["prompt_tokens"] for answer in (ended, going_on)]
    assert used[0] - used[1] == len("\nAssistant:")


# -- bombs ----------------------------------------------------------------------------------------


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    """2^depth values behind few words."""
    parts: dict[str, Any] = {"d0": {"type": "integer"}}
    for i in range(1, depth):
        parts[f"d{i}"] = {
            "allOf": [{"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"minimum": i}]} for _ in range(9)]
        }
    return {"$defs": parts, "$ref": f"#/$defs/d{depth - 1}"}


SCHEMAS: dict[str, Any] = {
    "deep-33": deep(33),
    "deep-150": deep(150),
    "deep-lists": {"anyOf": [{"items": deep(32)}]},
    "deep-const": {"const": json.loads("[" * 300 + "]" * 300)},
    "wide": {"properties": {f"p{i}": {"type": "string"} for i in range(501)}},
    "wide-anyof": {"anyOf": [{"type": "string", "maxLength": i} for i in range(900)], "uniqueItems": True},
    "large": {"enum": ["x" * 70_000]},
    "large-enum": {"enum": list(range(1001))},
    "self": {"allOf": [{"$ref": "#"}, {"type": "nosuch"}]},
    "loop": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "doubling": doubling(20),
    "many-allof": {"allOf": [{"type": "string", "pattern": f".*p{i}.*"} for i in range(20)]},
    "product": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(8)]},
    "multiple": {"type": "integer", "multipleOf": 123456789},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949, 9941)]},
    "items": {"type": "array", "minItems": 10**6},
    "length": {"type": "string", "minLength": 10**9},
    "pattern-nest": {"pattern": "(" * 5000 + "a" + ")" * 5000},
    "pattern-repeat": {"pattern": "a{1,100000}"},
    "remote": {"$ref": "http://127.0.0.1:9/schema"},
}
EXPRESSIONS = {
    "nest": "(" * 60_000 + ")" * 60_000,
    "nest-33": "(" * 33 + "a" + ")" * 33,
    "repeat": "a{5000}",
    "optional": "(a?){900}a{900}",
    "large": "a" * 70_000,
}
GRAMMARS = {
    "nest": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000,
    "nest-33": "start: " + "(" * 33 + '"a"' + ")" * 33,
    "repeat": 'start: "a"{1000000}',
    "endless": "start: start start",
    "large": 'start: "' + "a" * 70_000 + '"',
}


def tools(parameters: Any, count: int = 1) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)
    ]
    return {"tools": made, "tool_choice": "required"}


BOMBS: dict[str, dict[str, Any]] = {
    **{f"schema-{name}": {"guided_json": schema} for name, schema in SCHEMAS.items()},
    **{f"regex-{name}": {"guided_regex": text} for name, text in EXPRESSIONS.items()},
    **{f"lark-{name}": {"guided_grammar": text} for name, text in GRAMMARS.items()},
    "tools-deep": tools(deep(40)),
    "tools-large": tools({"enum": ["x" * 3000]}, 100),
    "tools-many": tools({}, 129),
    "tools-multiple": tools({"properties": {"a": SCHEMAS["multiples"]}}),
}


async def test_bombs_are_refused_soon_and_harm_nobody(tmp_path: Path) -> None:
    assert len(BOMBS) >= 35
    model = toy(write_gguf(tmp_path / "toy.gguf", context=4096), context=4096, parallel=4)
    slow = {}
    async with application(tmp_path, model, lark_grammars=True) as app, client(app) as http:
        await ask(http, guided_choice=["warm"])
        for name, fields in BOMBS.items():
            start = time.monotonic()
            response = await http.post(CHAT, json=chat(max_tokens=20, **fields))
            slow[name] = time.monotonic() - start
            assert response.status_code == 400, (name, response.text[:300])
            assert error_of(response)["param"], name
        assert (await ask(http, guided_choice=["fine"]))["message"]["content"] == "fine"
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may have this machine, too
    assert max(slow.values()) < 2.0 * busy, sorted(slow.items(), key=lambda item: -item[1])[:5]
