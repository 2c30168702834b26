"""Probes, metrics, the list of models, tokens."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from server.app import Server
from tests.server.api.support import CHAT, application, chat, client
from tests.server.pool.support import toy, write_gguf

LABELS = {"model": "toy", "variant": "q4_0", "backend": "toy-rows"}


async def metric(http: httpx.AsyncClient, name: str, **labels: str) -> float:
    text = (await http.get("/metrics")).text
    samples = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"quantserve:{name}" and sample.labels == {**LABELS, **labels}
    ]
    return samples[0] if samples else 0.0


async def test_metrics_count_what_was_done(http: httpx.AsyncClient) -> None:
    response = (await http.post(CHAT, json=chat(n=2, max_tokens=5))).json()
    assert await metric(http, "prompt_tokens_total") == response["usage"]["prompt_tokens"]
    assert await metric(http, "generation_tokens_total") == 10
    assert await metric(http, "request_success_total", finished_reason="length") == 2
    assert await metric(http, "time_to_first_token_seconds_count") == 2
    assert await metric(http, "inter_token_latency_seconds_count") >= 2
    assert await metric(http, "e2e_request_latency_seconds_count") == 2
    for name in ("num_requests_running", "num_requests_waiting"):
        assert await metric(http, name) == 0
    assert (await http.get("/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_a_preloaded_model_makes_the_server_ready(tmp_path: Path) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"), preload=True, context=256)
    async with application(tmp_path, model) as app, client(app) as http:
        first = await http.get("/ready")
        assert first.status_code == 503
        assert first.json()["models"] == [{"id": "toy", "state": first.json()["models"][0]["state"]}]
        assert first.json()["error"]["code"] == "model_loading"
        async with asyncio.timeout(20):
            while (answer := await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        assert answer.json() == {"status": "ready"}
        assert (await http.get("/health")).json() == {"status": "ok"}


async def test_without_preloading_the_server_is_ready_at_once(http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 200
    assert set((await http.get("/version")).json()) == {"version"}


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_may_ask_for_the_head_alone(http: httpx.AsyncClient, path: str) -> None:
    whole, head = await http.get(path), await http.head(path)
    assert head.status_code == 200
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert set((await http.delete(path)).headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_a_model_is_listed_and_found_by_each_of_its_names(tmp_path: Path) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"), aliases=("other",))
    async with application(tmp_path, model) as app, client(app) as http:
        [card] = (await http.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["owned_by"]) == ("toy", "model", "quantserve")
        assert (card["state"], card["variant"], card["aliases"]) == ("unloaded", "toy:q4_0", ["other"])
        for name in ("toy", "other", "toy:q4_0"):
            assert (await http.get(f"/v1/models/{name}")).json()["id"] == name
        answer = await http.post(CHAT, json=chat(model="other"))
        assert answer.json()["model"] == "other"
        assert answer.headers["x-variant"] == "toy:q4_0"
        loaded = (await http.get("/v1/models/toy")).json()
        assert (loaded["state"], loaded["backend"], loaded["label"]) == ("ready", "toy-rows", "unmeasured")
        assert loaded["template"] == "default-plain"


@pytest.mark.parametrize("field", ["content", "prompt"])
@pytest.mark.parametrize("special", ["add_special", "add_special_tokens"])
async def test_tokens_and_back(http: httpx.AsyncClient, field: str, special: str) -> None:
    body = {"model": "toy", field: "Hello", special: False}
    tokens = (await http.post("/tokenize", json=body)).json()
    assert tokens == {"tokens": [40, 69, 76, 76, 79], "count": 5}
    back = await http.post("/detokenize", json={"model": "toy", "tokens": tokens["tokens"]})
    assert back.json() == {"content": "Hello"}
    assert back.headers["x-variant"] == "toy:q4_0"


@pytest.mark.parametrize("twice", [{"prompt": "you"}, {"add_special": True, "add_special_tokens": 1}])
async def test_a_text_by_two_names_is_refused(http: httpx.AsyncClient, twice: dict[str, object]) -> None:
    response = await http.post("/tokenize", json={"model": "toy", "content": "Hello"} | twice)
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(": is given by another name, too")


async def test_a_text_may_come_by_every_name_that_servers_have_for_it(http: httpx.AsyncClient) -> None:
    body = {"model": "toy", "content": "Hello", "prompt": "Hello", "add_special": False}
    response = await http.post("/tokenize", json=body | {"add_special_tokens": False})
    assert response.json()["count"] == 5


async def test_tokens_that_do_not_exist_are_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/detokenize", json={"model": "toy", "tokens": [5, 97]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"


async def test_the_interface_is_described(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/quantize", "/tokenize"} <= set(paths)


NAMED = {  # what operators were promised, by the kind of each
    "histogram": (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds",
    ),
    "gauge": (
        "num_requests_running", "num_requests_waiting", "num_requests_held", "kv_cache_usage_perc", "jobs",
        "loads_waiting", "memory_budget_bytes", "memory_held_bytes",
    ),
    "counter": (
        "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
        "request_success", "request_rejections", "engine_loads", "engine_evictions", "engine_restarts",
    ),
}  # fmt: skip


async def test_every_metric_is_there_under_its_name_and_kind(http: httpx.AsyncClient) -> None:
    assert (await http.post(CHAT, json=chat())).status_code == 200
    assert (await http.post(CHAT, json={})).status_code == 400
    text = (await http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for kind, names in NAMED.items():
        for name in names:
            family = families[f"quantserve:{name}"]
            assert family.type == kind, name
            assert family.documentation, name
    [refused] = [s for s in families["quantserve:request_rejections"].samples if s.name.endswith("_total")]
    assert refused.labels == {"code": "invalid_value"}


async def test_the_time_in_the_queue_is_that_until_a_slot(http: httpx.AsyncClient) -> None:
    """Four slots: the others wait for as long as the first four take, and their queue time says so."""
    long = chat(max_tokens=200, messages=[{"role": "user", "content": "a"}])
    await asyncio.gather(*(http.post(CHAT, json={**long, "user": str(n)}) for n in range(12)))
    assert await metric(http, "request_queue_time_seconds_count") == 12
    whole = await metric(http, "e2e_request_latency_seconds_sum")
    queued = await metric(http, "request_queue_time_seconds_sum")
    assert 0.2 * whole < queued < whole


async def test_a_clock_that_is_set_does_not_change_the_uptime(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        status = (await http.get("/admin/status")).json()
    assert 0 <= status["uptime_s"] < 60


def test_signals_after_the_last_answer_do_not_make_the_end_a_crash() -> None:
    """From then on until the process has ended nobody handles them."""
    server = Server(uvicorn.Config("unused:app"), lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with server.capture_signals():
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with server.capture_signals():
            signal.raise_signal(signal.SIGTERM)
        assert server.should_exit
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
