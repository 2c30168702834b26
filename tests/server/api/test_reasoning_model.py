"""Thoughts of a real model behind llama.cpp, whose template carries the marks: bounded, split, streamed."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.catalog import Model
from tests.server.api.support import CHAT, application, chat, client, error_of, events

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BEGUN = TURNS + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}{# </think> #}"
OPEN = TURNS + "{% if add_generation_prompt %}assistant: {% endif %}{# <think></think> #}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


@pytest.fixture
async def http(
    request: pytest.FixtureRequest, tiny_chat: Path, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """The bundled model with the template of the test."""
    folder = shutil.copytree(tiny_chat, tmp_path / "thinker")
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"chat_template": request.param}))
    model = Model(id="toy", source=str(folder), variants=("q8_0",), default="q8_0", context=256, parallel=4)
    async with application(tmp_path, model) as app, client(app) as http:
        http.timeout = httpx.Timeout(120)
        yield http


async def whole(http: httpx.AsyncClient, **fields: object) -> tuple[str, str, str, int]:
    """(thoughts, answer, why it ended, tokens)."""
    response = await http.post(CHAT, json=chat(**fields))
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    message, tokens = choice["message"], response.json()["usage"]["completion_tokens"]
    return message.get("reasoning_content", ""), message["content"], choice["finish_reason"], tokens


async def streamed(http: httpx.AsyncClient, **fields: object) -> tuple[str, str, str, int]:
    """The same from a stream; no thought comes after the answer has begun."""
    body = chat(stream=True, stream_options={"include_usage": True}, **fields)
    chunks = events((await http.post(CHAT, json=body)).text)
    thoughts = answer = finish = ""
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta: dict[str, Any] = choice["delta"]
        assert not (answer and delta.get("reasoning_content"))
        thoughts += delta.get("reasoning_content") or ""
        answer += delta.get("content") or ""
        finish = choice["finish_reason"] or finish
    return thoughts, answer, finish, chunks[-1]["usage"]["completion_tokens"]


@pytest.mark.parametrize("http", [BEGUN], indirect=True)
async def test_thoughts_end_at_their_budget(http: httpx.AsyncClient) -> None:
    endless: dict[str, object] = {"max_tokens": 40, "seed": 1, "temperature": 0.7}
    thoughts, answer, finish, tokens = await whole(http, **endless)
    assert (answer, finish, tokens) == ("", "length", 40)
    assert thoughts
    assert await streamed(http, **endless) == (thoughts, answer, finish, tokens)
    bounded = {**endless, "reasoning_budget": 8}
    thoughts, answer, finish, tokens = await whole(http, **bounded)
    assert thoughts
    assert answer
    assert "think>" not in thoughts
    tokenized = await http.post("/tokenize", json={"model": "toy", "content": thoughts, "add_special": False})
    assert len(tokenized.json()["tokens"]) <= 8
    assert await streamed(http, **bounded) == (thoughts, answer, finish, tokens)
    at_once, answer, _, _ = await whole(http, **endless, reasoning_effort="none")
    assert at_once == ""
    assert answer
    by_schema = {**bounded, "response_format": FORMAT}
    thoughts, answer, finish, _ = await whole(http, **by_schema)
    assert thoughts
    assert finish == "stop"
    assert json.loads(answer)["a"] <= 99
    assert await streamed(http, **by_schema) == await whole(http, **by_schema)


@pytest.mark.parametrize("http", [OPEN], indirect=True)
async def test_an_answer_without_the_opening_mark_has_no_thoughts(http: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"max_tokens": 30, "seed": 1}
    thoughts, answer, _, _ = await whole(http, **fields)
    assert (thoughts, bool(answer)) == ("", True)
    assert (await streamed(http, **fields))[:2] == ("", answer)
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>"}]
    going_on = {**fields, "messages": begun, "continue_final_message": True, "reasoning_budget": 5}
    thoughts, answer, _, _ = await whole(http, **going_on)
    assert thoughts
    assert answer
    assert (await streamed(http, **going_on))[:2] == (thoughts, answer)
    wrong = await http.post(CHAT, json=chat(reasoning_budget=-1))
    assert error_of(wrong)["param"] == "reasoning_budget"
