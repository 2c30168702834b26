"""Completions over HTTP: prompts in all their shapes, echo, best_of."""

import httpx
import pytest

from tests.server.api.support import COMPLETIONS, completion, error_of, events


async def texts(http: httpx.AsyncClient, **fields: object) -> list[str]:
    response = await http.post(COMPLETIONS, json=completion(**fields))
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


async def test_an_answer_has_openais_shape(http: httpx.AsyncClient) -> None:
    body = (await http.post(COMPLETIONS, json=completion())).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == len("Once upon")


async def test_many_prompts_are_answered_in_order_as_if_alone(http: httpx.AsyncClient) -> None:
    prompts = [f"Day {i} of" for i in range(12)]
    together = await texts(http, prompt=prompts)
    assert together == [text for prompt in prompts for text in await texts(http, prompt=prompt)]


async def test_a_text_and_its_tokens_are_the_same_prompt(http: httpx.AsyncClient) -> None:
    tokens = [byte - 32 for byte in b"Once upon"]
    [text] = await texts(http)
    assert await texts(http, prompt=tokens) == [text]
    assert await texts(http, prompt=[tokens, tokens]) == [text, text]


async def test_n_answers_to_each_prompt_stand_together(http: httpx.AsyncClient) -> None:
    fields = {"temperature": 1, "seed": 3}
    both = await texts(http, prompt=["a", "b"], n=2, **fields)
    assert both == [
        *await texts(http, prompt="a", n=2, **fields),
        *await texts(http, prompt="b", n=2, **fields),
    ]


async def test_echo_puts_the_prompt_first(http: httpx.AsyncClient) -> None:
    [text] = await texts(http)
    assert await texts(http, echo=True) == ["Once upon" + text]
    assert await texts(http, echo=True, prompt=[47, 78]) == ["On" + (await texts(http, prompt=[47, 78]))[0]]
    assert await texts(http, echo=True, max_tokens=0) == ["Once upon"]
    chunks = events((await http.post(COMPLETIONS, json=completion(echo=True, stream=True))).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Once upon" + text


async def test_echo_scores_every_token_of_the_prompt_but_the_first(http: httpx.AsyncClient) -> None:
    body = completion(echo=True, logprobs=1, max_tokens=3)
    [choice] = (await http.post(COMPLETIONS, json=body)).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == list(range(len("Once upon") + 3))
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    [scored] = (await http.post(COMPLETIONS, json={**body, "max_tokens": 0})).json()["choices"]
    assert scored["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-3]
    chunks = events((await http.post(COMPLETIONS, json={**body, "stream": True})).text)
    offsets = [
        o for chunk in chunks if (scored := chunk["choices"][0]["logprobs"]) for o in scored["text_offset"]
    ]
    assert offsets == logprobs["text_offset"]


async def test_the_best_candidates_are_kept_and_all_are_counted(http: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"temperature": 1, "seed": 11, "max_tokens": 5}
    body = completion(n=4, logprobs=0, **fields)
    every = (await http.post(COMPLETIONS, json=body)).json()["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in every]
    ranked = sorted(range(4), key=lambda i: means[i], reverse=True)
    response = (await http.post(COMPLETIONS, json=completion(n=2, best_of=4, **fields))).json()
    assert [choice["text"] for choice in response["choices"]] == [every[i]["text"] for i in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in response["choices"])
    assert response["usage"]["completion_tokens"] == 20
    assert response["usage"]["prompt_tokens"] == len("Once upon")


async def test_streams_of_many_prompts_are_told_apart(http: httpx.AsyncClient) -> None:
    prompts = ["a", "b", "c"]
    whole = await texts(http, prompt=prompts)
    body = completion(prompt=prompts, stream=True, stream_options={"include_usage": True})
    chunks = events((await http.post(COMPLETIONS, json=body)).text)
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    got = {0: "", 1: "", 2: ""}
    for chunk in chunks[:-1]:
        got[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert [got[i] for i in range(3)] == whole


@pytest.mark.parametrize("prompt", ["", [97], [[1], [10**6]], [10**8], "x" * 300])
async def test_prompts_that_the_model_cannot_take_are_refused(
    http: httpx.AsyncClient, prompt: object
) -> None:
    response = await http.post(COMPLETIONS, json=completion(prompt=prompt))
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


async def test_the_default_is_sixteen_tokens(http: httpx.AsyncClient) -> None:
    body = (await http.post(COMPLETIONS, json={"model": "toy", "prompt": "Day", "temperature": 0})).json()
    assert body["usage"]["completion_tokens"] == 16
