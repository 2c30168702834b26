"""`prompt_logprobs`: what the model thought of each token of the prompt, on every backend."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.catalog import Model
from tests.server.api.support import (
    CHAT,
    COMPLETIONS,
    application,
    chat,
    client,
    completion,
    error_of,
)

Scores = list[dict[str, dict[str, Any]] | None]


async def asked(http: httpx.AsyncClient, path: str, body: object) -> Any:
    response = await http.post(path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def check_scores(scores: Scores, tokens: list[int], most: int) -> None:
    """An entry a token, its own first, ranks in the order of likelihood."""
    assert len(scores) == len(tokens)
    assert scores[0] is None
    for token, entry in zip(tokens[1:], scores[1:], strict=True):
        assert entry is not None
        assert next(iter(entry)) == str(token)
        assert most <= len(entry) <= most + 1
        ranked = sorted(entry.values(), key=lambda one: float(one["rank"]))
        assert [one["rank"] for one in ranked[:most]] == list(range(1, most + 1))
        values = [one["logprob"] for one in ranked]
        assert values == sorted(values, reverse=True)
        assert all(value <= 1e-6 for value in values)


async def test_completions_score_each_prompt_once(http: httpx.AsyncClient) -> None:
    prompts = ["Once upon", "Day", "x"]
    body = completion(prompt=prompts, prompt_logprobs=3, n=2, temperature=1, seed=1)
    choices = (await asked(http, COMPLETIONS, body))["choices"]
    assert len(choices) == 6
    for number, choice in enumerate(choices):
        text = prompts[number // 2]
        check_scores(choice["prompt_logprobs"], [byte - 32 for byte in text.encode()], 3)
        assert choice["text"][: len(text)] != text
        assert choice["logprobs"] is None
    plain = (await asked(http, COMPLETIONS, completion(prompt=prompts[:1])))["choices"][0]
    assert "prompt_logprobs" not in plain
    assert (
        plain["text"] == (await asked(http, COMPLETIONS, completion(prompt_logprobs=0)))["choices"][0]["text"]
    )


async def test_echo_and_scores_each_list_what_they_were_asked_for(http: httpx.AsyncClient) -> None:
    body = completion(echo=True, logprobs=1, prompt_logprobs=4, max_tokens=0)
    [choice] = (await asked(http, COMPLETIONS, body))["choices"]
    check_scores(choice["prompt_logprobs"], [byte - 32 for byte in b"Once upon"], 4)
    echoed = choice["logprobs"]
    assert all(1 <= len(top) <= 2 for top in echoed["top_logprobs"][1:])
    found = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    assert found == echoed["token_logprobs"][1:]
    body = completion(echo=True, logprobs=4, prompt_logprobs=0)
    [choice] = (await asked(http, COMPLETIONS, body))["choices"]
    check_scores(choice["prompt_logprobs"], [byte - 32 for byte in b"Once upon"], 0)
    assert all(len(top) >= 4 for top in choice["logprobs"]["top_logprobs"][1:])
    silent = (await asked(http, COMPLETIONS, completion(echo=True, prompt_logprobs=0)))["choices"][0]
    assert silent["logprobs"] is None


async def test_chat_has_them_beside_its_choices(http: httpx.AsyncClient) -> None:
    answer = await asked(http, CHAT, chat(prompt_logprobs=2, n=3, temperature=1))
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "".join(next(iter(e.values()))["decoded_token"] for e in answer["prompt_logprobs"][1:]).strip()
    assert "prompt_logprobs" not in await asked(http, CHAT, chat())


async def test_the_best_candidates_are_chosen_as_without_an_echo(http: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"best_of": 4, "n": 2, "temperature": 1, "seed": 5, "stop": ["e", "a"]}
    plain = await asked(http, COMPLETIONS, completion(**fields))
    echoed = await asked(http, COMPLETIONS, completion(**fields, echo=True, logprobs=1))
    assert [c["text"] for c in echoed["choices"]] == ["Once upon" + c["text"] for c in plain["choices"]]


@pytest.mark.parametrize(
    "fields", [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True}]
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_beyond_the_bounds_is_refused(
    http: httpx.AsyncClient, path: str, fields: dict[str, object]
) -> None:
    body = chat(**fields) if path == CHAT else completion(**fields)
    assert error_of(await http.post(path, json=body))["param"] == "prompt_logprobs"
    body |= {"prompt_logprobs": 1, "stream": True}
    assert error_of(await http.post(path, json=body))["param"] == "prompt_logprobs"


@pytest.mark.parametrize(("variant", "backend"), [("q4_k_m", "llama"), ("w8a16", "compressed")])
async def test_real_models_score_prompts(
    variant: str, backend: str, tiny_chat: Path, session_cache: Path, tmp_path: Path
) -> None:
    """Both doors, against the scores of an echo of the same tokens."""
    model = Model(
        id="toy", source=str(tiny_chat), variants=(variant,), default=variant, context=256, parallel=2
    )
    async with application(tmp_path, model) as app, client(app) as http:
        text = {"model": "toy", "content": "The capital of France is Paris."}
        tokens = (await asked(http, "/tokenize", text))["tokens"]
        body = completion(prompt=tokens, echo=True, logprobs=3, prompt_logprobs=3, max_tokens=2)
        [choice] = (await asked(http, COMPLETIONS, body))["choices"]
        check_scores(choice["prompt_logprobs"], tokens, 3)
        own = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
        assert own == choice["logprobs"]["token_logprobs"][1 : len(tokens)]
        answer = await asked(http, CHAT, chat(prompt_logprobs=0, max_tokens=2))
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        loaded = (await http.get("/v1/models")).json()["data"][0]
    assert backend in str(loaded)
