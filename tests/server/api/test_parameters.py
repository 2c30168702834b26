"""Every generation parameter has an effect on its doors, or is refused: none is dropped in silence."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.support import CHAT, COMPLETIONS, application, chat, client, completion
from tests.server.pool.support import toy, write_gguf

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "look"}}

BOTH: dict[str, Any] = {
    "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 7,
    "stop": ["q"], "stop_token_ids": [3], "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.2, "logit_bias": {"5": 1.5}, "prompt_logprobs": 1, "stream": True, "priority": 1,
    "timeout": 50.0,
    "response_format": {"type": "json_object"}, "guided_regex": "[a-c]{2}", "guided_choice": ["ab", "cd"],
    "guided_json": SCHEMA, "structured_outputs": {"choice": ["ab"]},
}  # fmt: skip
CHAT_ONLY: dict[str, Any] = {
    "max_completion_tokens": 4, "logprobs": True, "tools": [TOOL], "reasoning_effort": "none",
    "add_generation_prompt": False,
}  # fmt: skip
CHAT_TOGETHER: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 2},
    *({"tools": [TOOL], "tool_choice": choice} for choice in ("auto", "none", "required", NAMED)),
    {"tools": [TOOL], "parallel_tool_calls": False},
    {"stream": True, "stream_options": {"include_usage": True}},
]
COMPLETIONS_ONLY: dict[str, Any] = {"echo": True, "logprobs": 2, "best_of": 2}


async def accepted(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    response = await http.post(path, json=body)
    assert response.status_code == 200, (body, response.text)
    assert "x-ignored-params" not in response.headers, body
    return response


async def test_each_parameter_is_taken(tmp_path: Path) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"), context=1024, parallel=4)
    async with application(tmp_path, model) as app, client(app) as http:
        for name, value in (BOTH | CHAT_ONLY).items():
            await accepted(http, CHAT, chat(**{"max_tokens": 40, name: value}))
        for fields in CHAT_TOGETHER:
            await accepted(http, CHAT, chat(**{"max_tokens": 40, **fields}))
        for name, value in (BOTH | COMPLETIONS_ONLY).items():
            await accepted(http, COMPLETIONS, completion(**{"max_tokens": 40, name: value}))


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"echo": True}), (CHAT, {"best_of": 2}), (CHAT, {"max_output_tokens": 5}), (CHAT, {"suffix": "."}),
    (CHAT, {"instructions": "Be kind."}), (CHAT, {"structured_outputs": {"structural_tag": "x"}}),
    (COMPLETIONS, {"top_logprobs": 2}), (COMPLETIONS, {"parallel_tool_calls": False}),
    (COMPLETIONS, {"tools": [TOOL]}),
    (RESPONSES, {"response_format": {"type": "json_object"}}), (RESPONSES, {"max_tokens": 5}),
    (RESPONSES, {"logprobs": True}), (RESPONSES, {"guided_regex": "a"}), (RESPONSES, {"regex": "a"}),
    (MESSAGES, {"n": 2}), (MESSAGES, {"stop": ["a"]}), (MESSAGES, {"logprobs": True}),
    (MESSAGES, {"response_format": {"type": "json_object"}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields"), FOREIGN, ids=lambda value: str(value)[:30])
async def test_what_only_another_route_has_is_refused(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    response = await http.post(path, json=_least(path) | fields)
    assert response.status_code == 400
    (name,) = fields
    assert response.json()["error"]["message"].startswith(f"{name}: ")


async def test_one_parameter_by_two_names_with_one_value_passes(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat(guided_regex="a+", regex="a+"))
    assert response.status_code == 200


@pytest.mark.parametrize(
    "fields", [{"guided_regex": "a", "regex": "b"}, {"thinking_budget": 2, "reasoning_budget": 1}]
)
async def test_one_parameter_by_two_names_is_refused(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await http.post(CHAT, json=chat(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(": is given by another name, too")


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": "x"}, {"thinking_token_budget": -1}, {"thinking_budget": 5},
        {"reasoning_budget": 5}, {"regex": "("}, {"regex": "(" * 40}, {"lark": "start: a"}, {"choice": []},
        {"choice": ["a" * 70_000]},
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_an_error_calls_a_parameter_as_the_client_does(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    (name,) = fields
    response = await http.post(CHAT, json=chat(**fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"].partition(":")[0]) == (name, name)


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        (CHAT, {"structured_outputs": {"json_object": False}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"json_object": False, "choice": ["a"]}}, ""),
        (CHAT, {"tool_choice": "auto", "parallel_tool_calls": False}, "tool_choice, parallel_tool_calls"),
        (CHAT, {"tools": [], "tool_choice": "none"}, "tool_choice"),
        (CHAT, {"tool_choice": None, "parallel_tool_calls": None, "structured_outputs": None}, ""),
        (RESPONSES, {"tool_choice": "none", "parallel_tool_calls": True}, "tool_choice, parallel_tool_calls"),
        (MESSAGES, {"tool_choice": {"type": "auto"}}, "tool_choice"),
    ],
)
async def test_what_has_no_effect_is_named(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], names: str
) -> None:
    response = await http.post(path, json=_least(path) | fields)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-params", "") == names


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"echo": False, "best_of": None, "metadata": {"a": "b"}, "store": True, "user": "u"}),
        (COMPLETIONS, {"tools": [], "parallel_tool_calls": True, "top_logprobs": None, "messages": ["a"]}),
        (MESSAGES, {"n": 1, "stop": [], "logprobs": False, "metadata": {"user_id": "u"}}),
    ],
)
async def test_a_foreign_parameter_that_asks_for_nothing_passes(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    assert (await http.post(path, json=_least(path) | fields)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/apply-template"])
async def test_template_variables_that_nothing_reads_are_named(http: httpx.AsyncClient, path: str) -> None:
    body = chat(chat_template_kwargs={"mood": "good", "bos_token": "<b>"}, user="u")
    response = await http.post(path, json=body)
    assert response.status_code == 200
    named = response.headers["x-ignored-params"].split(", ")
    assert {"user", "chat_template_kwargs.mood"} <= set(named)


PARTS = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
UNREAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"role": "user", "content": "a", "name": "Ada"}, ["messages.name"]),
    ({"role": "user", "content": "a", "tool_call_id": "c"}, ["messages.tool_call_id"]),
    ({"role": "user", "content": "a", "reasoning_content": "hm"}, ["messages.reasoning_content"]),
    ({"role": "user", "content": PARTS}, ["messages.content.cache_control"]),
    (
        {"role": "assistant", "content": "a", "refusal": "b", "name": "c"},
        ["messages.name", "messages.refusal"],
    ),
    ({"role": "assistant", "refusal": "b"}, []),
    ({"role": "tool", "tool_call_id": "c", "content": "a", "name": "look"}, []),  # "Result of look: a"
    ({"role": "tool", "tool_call_id": "c", "content": "a"}, []),
]


@pytest.mark.parametrize(("message", "names"), UNREAD, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("path", [CHAT, "/apply-template"])
async def test_what_the_template_does_not_show_of_a_message_is_named(
    http: httpx.AsyncClient, path: str, message: dict[str, Any], names: list[str]
) -> None:
    response = await http.post(path, json=chat(messages=[message]))
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-params", "").split(", ") == (names or [""])


async def test_a_refusal_is_what_was_said(http: httpx.AsyncClient) -> None:
    said = [{"role": "assistant", "content": None, "refusal": "I will not."}]
    prompt = (await http.post("/apply-template", json=chat(messages=said))).json()["prompt"]
    assert "I will not." in prompt


@pytest.mark.parametrize(
    ("method", "path"), [("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/health")]
)
async def test_what_stands_in_the_query_is_named(http: httpx.AsyncClient, method: str, path: str) -> None:
    body = _least(path) if method == "POST" else None
    response = await http.request(method, f"{path}?api-version=1&top_k=5&api-version=2", json=body)
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "query.api-version, query.top_k"


async def test_a_parameter_of_the_query_that_is_read_is_not_named(http: httpx.AsyncClient) -> None:
    id = (await http.post(RESPONSES, json=_least(RESPONSES))).json()["id"]
    response = await http.get(f"{RESPONSES}/{id}?stream=false")
    assert (response.status_code, "x-ignored-params" in response.headers) == (200, False)
    response = await http.get(f"{RESPONSES}/{id}?starting_after=3")
    assert response.headers["x-ignored-params"] == "query.starting_after"


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (
            RESPONSES,
            {
                "tools": [{"type": "function", "name": "look"}],
                "tool_choice": {"type": "function", "name": "look"},
                "text": {"format": {"type": "json_object"}},
                "max_output_tokens": 60,
            },
            "text.format",
        ),
        (
            MESSAGES,
            {
                "tools": [{"name": "look", "input_schema": SCHEMA}],
                "tool_choice": {"type": "any"},
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
                "max_tokens": 60,
            },
            "output_config.format",
        ),
    ],
)
async def test_a_form_beside_a_forced_call_is_named(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], name: str
) -> None:
    response = await http.post(path, json=_least(path) | fields)
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-params"] == name


def _least(path: str) -> dict[str, Any]:
    match path:
        case "/v1/chat/completions":
            return chat()
        case "/v1/completions":
            return completion()
        case "/v1/responses":
            return {"model": "toy", "input": "a", "max_output_tokens": 4}
        case _:
            return {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
