"""/v1/messages: Anthropic's shapes, events and errors, over the road of chat."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.choice import Delta
from server.api.generate import Begun, Tally
from server.api.messages.answer import MessageEvents
from server.api.messages.conversation import chat_of
from server.api.schema.messages import MessagesRequest
from server.errors import EngineDied
from server.pool.states import Served
from server.text.calls import CallDelta
from server.text.vocabulary import Vocabulary
from tests.server.api.support import application, client
from tests.server.pool.support import toy, write_gguf

MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
SERVED = Served(id="toy:q4_0", model="toy", recipe="q4_0", key="k", format="gguf", backend="toy-rows")
TOOL = {"name": "look", "input_schema": CITY}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """With room for what the model is told of functions."""
    model = toy(write_gguf(tmp_path / "toy.gguf"), context=1024)
    async with application(tmp_path, model) as app, client(app) as http:
        yield http


def asked(**fields: object) -> dict[str, object]:
    return {"model": "toy", "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}


def named(text: str) -> list[dict[str, Any]]:
    """Events of a stream; the name of each is its type."""
    found: list[dict[str, Any]] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events of a stream."""
    assert events[0]["type"] == "message_start"
    assert events[-1] == {"type": "message_stop"}
    message: dict[str, Any] = events[0]["message"]
    open_block: dict[str, Any] | None = None
    written = ""
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                assert event["index"] == len(message["content"])
                open_block, written = event["content_block"], ""
            case "content_block_delta":
                kind = event["delta"]["type"].removesuffix("_delta")
                field = "partial_json" if kind == "input_json" else kind
                written += event["delta"][field]
            case "content_block_stop":
                assert open_block is not None
                kind = open_block["type"]
                name = "input" if kind == "tool_use" else kind
                open_block[name] = json.loads(written or "{}") if kind == "tool_use" else written
                message["content"].append(open_block)
                open_block = None
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert open_block is None
    return message


def bare(message: dict[str, Any]) -> dict[str, Any]:
    content = [{**block, "id": None} if "id" in block else block for block in message["content"]]
    spent = message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]
    usage = {"input": spent, "output": message["usage"]["output_tokens"]}
    return {**message, "id": None, "content": content, "usage": usage}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "max_tokens"),
        ({"system": [{"type": "text", "text": "be brief"}], "metadata": {"user_id": "u"}}, "max_tokens"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 100}, "tool_use"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}, "max_tokens": 100}, "tool_use"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "max_tokens"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": CITY}}, "max_tokens": 90},
            "end_turn",
        ),
    ],
)
async def test_a_stream_makes_the_whole_message(
    http: httpx.AsyncClient, fields: dict[str, object], reason: str
) -> None:
    answer = await http.post(MESSAGES, json=asked(**fields))
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", reason)
    stream = await http.post(MESSAGES, json=asked(**fields, stream=True))
    assert bare(together(named(stream.text))) == bare(whole)
    if reason == "tool_use":
        assert whole["content"][0]["input"] == {"city": "Rome"}


async def test_a_stop_sequence_is_named(http: httpx.AsyncClient) -> None:
    text = (await http.post(MESSAGES, json=asked())).json()["content"][0]["text"]
    stop = text[3:5]
    for stream in (False, True):
        answer = await http.post(MESSAGES, json=asked(stop_sequences=[stop], stream=stream))
        message = together(named(answer.text)) if stream else answer.json()
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
        assert message["content"][0]["text"] == text[: text.index(stop)]


async def test_an_assistants_message_at_the_end_is_continued(http: httpx.AsyncClient) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    plain = {"model": "toy", "max_tokens": 8, "temperature": 0, "messages": begun}
    chat = await http.post("/v1/chat/completions", json={**plain, "continue_final_message": True})
    answer = await http.post(MESSAGES, json=plain)
    assert answer.json()["content"][0]["text"] == chat.json()["choices"][0]["message"]["content"]


async def test_tokens_are_counted_as_they_are_used(http: httpx.AsyncClient) -> None:
    for fields in ({}, {"system": "be brief", "tools": [TOOL]}):
        body = asked(**fields)
        used = bare((await http.post(MESSAGES, json=body)).json())["usage"]["input"]
        del body["max_tokens"]
        counted = await http.post(f"{MESSAGES}/count_tokens", json=body)
        assert counted.json() == {"input_tokens": used}


def test_blocks_become_messages() -> None:
    said = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "t1", "name": "look", "input": {"city": "Rome"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
        {"type": "text", "text": "So?"},
    ]
    turns = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    chat = chat_of(MessagesRequest.model_validate(asked(messages=turns, system="Be kind.")))
    system, user, assistant, sun, error, question = [message.fields for message in chat.messages]
    assert (system["role"], user["content"]) == ("system", "hello")
    assert (assistant["content"], assistant["reasoning_content"]) == ("I look.", "hm")
    assert assistant["tool_calls"] == [
        {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"city":"Rome"}'}}
    ]
    assert (sun["role"], sun["tool_call_id"], sun["content"]) == ("tool", "t1", "sun")
    assert error["content"] == "Error: no such city"
    assert question == {"role": "user", "content": "So?"}


DELTAS = (
    Delta(0, "", reasoning="let me see"),
    Delta(0, "Well."),
    Delta(0, "", calls=(CallDelta(0, "", "look", "call_1"), CallDelta(0, '{"city":'))),
    Delta(0, "", calls=(CallDelta(0, '"Rome"}'), CallDelta(1, "{}", "look", "call_2"))),
    Delta(0, "", finish="tool_calls"),
)


def test_thoughts_text_and_calls_are_blocks_of_their_own() -> None:
    events = MessageEvents("msg_1", "toy", []).begin(Begun(SERVED, Vocabulary((b"a",), frozenset()), 5, 2))
    raw = b"".join(events.frames(part) for part in (*DELTAS, Tally(prompt=5, cached=2, completion=9)))
    message = together(named(raw.decode()))
    thought, text, first, second = message["content"]
    assert thought == {"type": "thinking", "thinking": "let me see", "signature": ""}
    assert text["text"] == "Well."
    assert (first["input"], second["input"]) == ({"city": "Rome"}, {})
    assert message["usage"]["input_tokens"] == 3
    last = named(events.error(EngineDied("gone")).decode())
    assert last == [{"type": "error", "error": {"type": "api_error", "message": "gone"}}]
    assert named(events.ping.decode()) == [{"type": "ping"}]


def kind_of(response: httpx.Response) -> str:
    body = response.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return str(body["error"]["type"])


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/count_tokens"])
async def test_errors_have_anthropics_shape(http: httpx.AsyncClient, path: str) -> None:
    for body, status, kind in (
        (asked(model="none"), 404, "not_found_error"),
        (asked(messages=[]), 400, "invalid_request_error"),
        (asked(messages=[{"role": "user", "content": [IMAGE]}]), 400, "invalid_request_error"),
        (asked(thinking={"type": "enabled", "budget_tokens": 5}), 400, "invalid_request_error"),
        (asked(tools=[{"type": "bash_20250124", "name": "bash"}]), 400, "invalid_request_error"),
        (asked(tool_choice={"type": "any"}), 400, "invalid_request_error"),
        (asked(container="c"), 400, "invalid_request_error"),
    ):
        response = await http.post(path, json=body)
        assert (response.status_code, kind_of(response)) == (status, kind), body
    assert kind_of(await http.post(path, content=b"{")) == "invalid_request_error"
    assert kind_of(await http.post(path, content=b"a" * 5_000_000)) == "request_too_large"
    assert (await http.get(path)).status_code == 405
    assert kind_of(await http.get(f"{path}/nowhere")) == "not_found_error"
    assert kind_of(await http.get(path, headers={"host": "evil.example"})) == "invalid_request_error"


async def test_an_image_is_named(http: httpx.AsyncClient) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}]
    response = await http.post(MESSAGES, json=asked(messages=turns))
    assert response.json()["error"]["message"] == "messages: content blocks of type image: not supported"


async def test_both_ways_to_send_a_key(tmp_path: Path) -> None:
    async with application(tmp_path, api_keys=("k",), key_rate=3) as app:
        async with client(app) as http:
            refused = await http.post(MESSAGES, json=asked())
            assert (refused.status_code, kind_of(refused)) == (401, "authentication_error")
        for headers in ({"x-api-key": "k"}, {"authorization": "Bearer k"}):
            async with client(app, **headers) as http:
                assert (await http.post(MESSAGES, json=asked())).status_code == 200
                assert (await http.get("/v1/models")).status_code == 200
        wrong = {"authorization": "Bearer wrong", "x-api-key": "k"}
        async with client(app, **wrong) as http:
            assert (await http.post(MESSAGES, json=asked())).status_code == 401
        async with client(app, **{"x-api-key": "k"}) as http:
            await http.post(MESSAGES, json=asked())
            late = await http.post(MESSAGES, json=asked())
            assert (late.status_code, kind_of(late)) == (429, "rate_limit_error")
            assert late.headers["retry-after"]
