"""/v1/responses, judged by OpenAI's own types: every answer and every event must be one of theirs."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.choice import Delta
from server.api.generate import Begun, Tally
from server.api.responses.answer import begun, whole_response
from server.api.responses.events import ResponseEvents
from server.api.responses.store import ResponseStore, Stored
from server.api.schema.response_answers import ModelResponse
from server.api.schema.responses import ResponsesRequest
from server.api.whole import Whole, collect
from server.errors import EngineDied, UnknownResponse
from server.pool.states import Served
from server.text.calls import CallDelta
from server.text.vocabulary import Vocabulary
from tests.server.api.support import application, client, error_of
from tests.server.pool.support import toy, write_gguf

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "name": "look", "parameters": CITY}
SERVED = Served(id="toy:q4_0", model="toy", recipe="q4_0", key="k", format="gguf", backend="toy-rows")
USER = {"role": "user", "content": "hello"}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """With room for what the model is told of functions."""
    model = toy(write_gguf(tmp_path / "toy.gguf"), context=1024)
    async with application(tmp_path, model) as app, client(app) as http:
        yield http


def asked(**fields: object) -> dict[str, object]:
    return {"model": "toy", "input": "hello", "max_output_tokens": 8, "temperature": 0, **fields}


def typed(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which OpenAI's types take, named and numbered as they should be."""
    found: list[dict[str, Any]] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        assert event["sequence_number"] == len(found)
        found.append(event)
    return found


def bare(value: Any) -> Any:
    """Without ids and times, which differ from one answer to the next."""
    if isinstance(value, list):
        return [bare(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: bare(item)
        for key, item in value.items()
        if key not in ("id", "call_id", "created_at", "completed_at", "cached_tokens")
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": [USER], "instructions": "be brief", "metadata": {"a": "b"}},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 0},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 100},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}, "max_output_tokens": 12},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": CITY}}, "max_output_tokens": 100},
    ],
)
async def test_a_stream_ends_with_what_the_whole_answer_is(
    http: httpx.AsyncClient, fields: dict[str, object]
) -> None:
    answer = await http.post(RESPONSES, json=asked(**fields))
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    Response.model_validate(whole)
    stream = await http.post(RESPONSES, json=asked(**fields, stream=True))
    events = typed(stream.text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert bare(events[-1]["response"]) == bare(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    for kind, text in (("output_text", "text"), ("function_call_arguments", "arguments")):
        deltas = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
        full = [event[text] for event in events if event["type"] == f"response.{kind}.done"]
        assert "".join(deltas) == "".join(full)
    assert events[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"] > 0


async def test_a_conversation_goes_on_from_a_stored_response(http: httpx.AsyncClient) -> None:
    first = (await http.post(RESPONSES, json=asked(instructions="once"))).json()
    said = first["output"][0]["content"][0]["text"]
    after = asked(input="more", previous_response_id=first["id"])
    second = (await http.post(RESPONSES, json=after)).json()
    turns = [USER, {"role": "assistant", "content": said}, {"role": "user", "content": "more"}]
    spelt = (await http.post(RESPONSES, json=asked(input=turns))).json()
    assert bare(second["output"]) == bare(spelt["output"])
    assert second["usage"]["input_tokens"] == spelt["usage"]["input_tokens"]
    assert second["previous_response_id"] == first["id"]
    stored = await http.get(f"{RESPONSES}/{second['id']}")
    assert stored.json() == second


async def test_calls_and_results_are_items(http: httpx.AsyncClient) -> None:
    call = asked(tools=[TOOL], tool_choice="required", max_output_tokens=100)
    (item,) = (await http.post(RESPONSES, json=call)).json()["output"]
    assert json.loads(item["arguments"]) == {"city": "Rome"}
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"}
    answer = await http.post(RESPONSES, json=asked(input=[USER, item, result], tools=[TOOL]))
    assert answer.status_code == 200
    assert "x-ignored-params" not in answer.headers
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    both = asked(tools=[TOOL, {**TOOL, "name": "other"}], tool_choice=allowed, max_output_tokens=100)
    assert (await http.post(RESPONSES, json=both)).json()["output"][0]["name"] == "look"


async def test_only_its_key_sees_a_response(tmp_path: Path) -> None:
    async with application(tmp_path) as app:
        async with client(app, authorization="Bearer one") as http:
            id = (await http.post(RESPONSES, json=asked())).json()["id"]
            unstored = (await http.post(RESPONSES, json=asked(store=False))).json()["id"]
            assert (await http.get(f"{RESPONSES}/{unstored}")).status_code == 404
        async with client(app, authorization="Bearer two") as other:
            for method in ("GET", "DELETE"):
                response = await other.request(method, f"{RESPONSES}/{id}")
                assert response.status_code == 404
                assert error_of(response)["code"] == "response_not_found"
            response = await other.post(RESPONSES, json=asked(previous_response_id=id))
            assert response.status_code == 400
            assert error_of(response)["code"] == "previous_response_not_found"
        async with client(app, **{"x-api-key": "one"}) as http:
            assert (await http.get(f"{RESPONSES}/{id}")).status_code == 200
            assert (await http.get(f"{RESPONSES}/{id}?stream=true")).status_code == 400
            assert (await http.post(f"{RESPONSES}/{id}/cancel")).status_code == 400
            assert (await http.delete(f"{RESPONSES}/{id}")).json()["deleted"] is True
            assert (await http.get(f"{RESPONSES}/{id}")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "none"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": None, "role": "user", "content": "a"}]}, "input[0]"),
        ({"input": [{"type": 0, "role": "user", "content": "a"}]}, "input[0]"),
        ({"input": [{"type": "", "role": "user", "content": "a"}]}, "input"),
        ({"input": "word " * 400}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_own_name(
    http: httpx.AsyncClient, fields: dict[str, object], param: str
) -> None:
    response = await http.post(RESPONSES, json=asked(**fields))
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_the_request_comes_back_without_what_nobody_defines(http: httpx.AsyncClient) -> None:
    deep: object = 1
    for _ in range(300):
        deep = {"a": deep}
    odd = {"odd": deep}
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "look", **odd}],
    }
    form = {"type": "json_schema", "name": "x", "schema": CITY, **odd}
    body = asked(tools=[{**TOOL, **odd}], tool_choice={**allowed, **odd}, text={"format": form})
    raw = json.dumps(body).encode()
    response = await http.post(RESPONSES, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert "odd" not in response.text
    assert response.json()["text"]["format"]["schema"] == CITY
    assert response.json()["tools"][0]["parameters"] == CITY


async def test_what_has_no_effect_is_named(http: httpx.AsyncClient) -> None:
    fields = {"include": ["reasoning.encrypted_content"], "user": "u", "unheard_of": 1}
    response = await http.post(RESPONSES, json=asked(**fields))
    assert response.headers["x-ignored-params"] == "user, unheard_of, include"


DELTAS = (
    Delta(0, "", reasoning="let me "),
    Delta(0, "", reasoning="see"),
    Delta(0, "Well."),
    Delta(0, "", calls=(CallDelta(0, "", "look", "call_1"), CallDelta(0, '{"city":'))),
    Delta(0, "", calls=(CallDelta(0, '"Rome"}'), CallDelta(1, "{}", "look", "call_2"))),
    Delta(0, "", finish="tool_calls"),
)
TALLY = Tally(prompt=5, cached=2, completion=9, reasoning=3)


def start() -> tuple[ModelResponse, Begun]:
    body = ResponsesRequest.model_validate(asked())
    return begun(body, "resp_1"), Begun(SERVED, Vocabulary((b"a",), frozenset()))


async def test_thoughts_text_and_calls_are_items_of_their_own() -> None:
    response, first = start()
    kept: list[ModelResponse] = []
    events = ResponseEvents(response, kept.append).begin(first)
    found = typed(b"".join(events.frames(part) for part in (*DELTAS, TALLY)).decode())

    async def parts() -> Any:
        for part in (first, *DELTAS, TALLY):
            yield part

    whole: Whole = await collect(parts())
    assert bare(found[-1]["response"]) == bare(
        json.loads(msgspec.json.encode(whole_response(response, whole)))
    )
    assert json.loads(msgspec.json.encode(kept[0])) == found[-1]["response"]
    kinds = [item["type"] for item in found[-1]["response"]["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    thought = next(event for event in found if event["type"] == "response.reasoning_text.done")
    assert thought["text"] == "let me see"
    assert found[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 3


def test_a_stream_that_breaks_off_says_so() -> None:
    response, first = start()
    events = ResponseEvents(response, lambda _: None).begin(first)
    raw = events.frames(DELTAS[2]) + events.error(EngineDied("gone"))
    last = typed(raw.decode())[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "gone"}


def test_the_store_is_bounded_in_number_and_bytes() -> None:
    response, _ = start()
    store = ResponseStore(most=3)
    for number in range(5):
        store.put("", Stored(begun(ResponsesRequest.model_validate(asked()), str(number)), []))
        store.get("", "0")
    assert len(store) == 3
    for forgotten in ("1", "2"):
        with pytest.raises(UnknownResponse):
            store.get("", forgotten)
    small = ResponseStore(most_bytes=3000)
    for _ in range(9):
        small.put("", Stored(response, [{"role": "user", "content": "x" * 1000}]))
        assert small.bytes <= 3000
    small.put("", Stored(response, [{"role": "user", "content": "x" * 5000}]))
    assert (len(small), small.bytes) == (0, 0)
