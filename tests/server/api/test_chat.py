"""Chat over HTTP, with a real engine process behind it."""

from pathlib import Path

import httpx
import pytest

from tests.server.api.support import CHAT, HELLO, chat, error_of, events


async def test_an_answer_has_openais_shape_and_names_its_variant(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat())
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "toy"
    assert body["system_fingerprint"].startswith("toy:q4_0@")
    [choice] = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 8
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert response.headers["x-variant"] == "toy:q4_0"
    assert "x-ignored-params" not in response.headers


async def test_streamed_and_whole_answers_agree(http: httpx.AsyncClient) -> None:
    whole = (await http.post(CHAT, json=chat(max_tokens=24))).json()
    response = await http.post(CHAT, json=chat(max_tokens=24, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    chunks = events(response.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]


async def test_usage_comes_last_where_it_is_asked_for(http: httpx.AsyncClient) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    chunks = events((await http.post(CHAT, json=body)).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it(http: httpx.AsyncClient, stream: bool) -> None:
    text = (await http.post(CHAT, json=chat(max_tokens=24))).json()["choices"][0]["message"]["content"]
    stop = text[5:12]  # several tokens long
    response = await http.post(CHAT, json=chat(max_tokens=24, stop=["\x07", stop], stream=stream))
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        got = "".join(choice["delta"].get("content", "") for choice in choices)
        finish = choices[-1]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        got, finish = choice["message"]["content"], choice["finish_reason"]
        assert response.json()["usage"]["completion_tokens"] == text.index(stop) + len(stop)
    assert got == text[: text.index(stop)]
    assert finish == "stop"


async def test_answers_to_one_request_differ_by_their_seeds_and_come_again(http: httpx.AsyncClient) -> None:
    body = chat(n=3, temperature=1, seed=5, max_tokens=6)
    first, again = [(await http.post(CHAT, json=body)).json() for _ in range(2)]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert first["usage"]["completion_tokens"] == 18
    alone = (await http.post(CHAT, json=chat(temperature=1, seed=6, max_tokens=6))).json()
    assert alone["choices"][0]["message"]["content"] == texts[1]


async def test_streamed_answers_to_one_request_each_begin_and_end(http: httpx.AsyncClient) -> None:
    body = chat(n=3, temperature=1, seed=5, max_tokens=3, stream=True)  # none of these ends by itself
    chunks = events((await http.post(CHAT, json=body)).text)
    for index in range(3):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "length"


async def test_seeds_are_random_when_none_is_given(http: httpx.AsyncClient) -> None:
    body = chat(temperature=1, max_tokens=12)
    texts = {(await http.post(CHAT, json=body)).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) > 1


async def test_without_a_limit_an_answer_goes_to_the_end_of_the_context(http: httpx.AsyncClient) -> None:
    for limit in ({}, {"max_tokens": 10**9}, {"max_tokens": 4, "max_completion_tokens": 1000}):
        body = {
            "model": "toy",
            "messages": [{"role": "user", "content": "a" * 100}],
            "temperature": 0,
            **limit,
        }
        answer = (await http.post(CHAT, json=body)).json()
        assert answer["usage"]["total_tokens"] <= 256
        ended = answer["choices"][0]["finish_reason"]
        assert ended == "stop" or answer["usage"]["total_tokens"] == 256


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    http: httpx.AsyncClient, stream: bool
) -> None:
    messages = [{"role": "user", "content": "word " * 200}]
    response = await http.post(CHAT, json=chat(messages=messages, stream=stream))
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "256" in error["message"]
    assert "101" in error["message"]


async def test_logprobs_go_with_their_text(http: httpx.AsyncClient) -> None:
    whole = (await http.post(CHAT, json=chat(logprobs=True, max_tokens=20))).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert bytes(b for token in content for b in token["bytes"]).decode() == whole["message"]["content"]
    assert all(token["logprob"] <= 0 and token["top_logprobs"] == [] for token in content)
    chunks = events((await http.post(CHAT, json=chat(logprobs=True, max_tokens=20, stream=True))).text)
    streamed = [
        token
        for chunk in chunks
        if (logprobs := chunk["choices"][0]["logprobs"])
        for token in logprobs["content"]
    ]
    assert streamed == content


async def test_ignored_parameters_are_named_in_a_header(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat(user="u", x_vendor=1))
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "user, x_vendor"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"logit_bias": {"97": 1}}, "logit_bias"), ({"stop_token_ids": [5, 97]}, "stop_token_ids")],
)
async def test_token_ids_must_be_the_models(
    http: httpx.AsyncClient, fields: dict[str, object], param: str
) -> None:
    response = await http.post(CHAT, json=chat(**fields))
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_a_stop_token_ends_the_answer_and_is_not_shown(http: httpx.AsyncClient) -> None:
    text = (await http.post(CHAT, json=chat())).json()["choices"][0]["message"]["content"]
    token = ord(text[4]) - 32
    answer = (await http.post(CHAT, json=chat(stop_token_ids=[token]))).json()
    assert answer["choices"][0]["message"]["content"] == text[: text.index(text[4])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == text.index(text[4]) + 1


async def test_a_prefix_is_shared_under_one_key_and_under_no_other(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "the same long beginning " * 8}]

    async def cached(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = (await http.post(CHAT, json=chat(messages=messages), headers=headers)).json()
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert await cached("one") == 0
    assert await cached("one") >= 176
    assert await cached("two") == 0
    assert await cached("") == 0
    assert await cached("one") >= 176


async def test_roles_parts_and_tools_that_may_not_be_called(http: httpx.AsyncClient, tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    response = await http.post(CHAT, json=chat(messages=messages, tools=tools, tool_choice="none"))
    assert response.status_code == 200
