"""Jobs over HTTP, with real builds of a tiny checkpoint where one is needed."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.catalog import Model
from tests.quant.checkpoints import write_checkpoint
from tests.server.api.support import application, chat, client, error_of, events
from tests.server.pool.support import files


def folder_model(source: Path) -> Model:
    return Model(id="tiny", source=str(source), variants=("q8_0",), default="q8_0", context=128, parallel=2)


async def finished(http: httpx.AsyncClient, id: str) -> Any:
    async with asyncio.timeout(120):
        while (job := (await http.get(f"/quantize/{id}")).json())["state"] in ("queued", "running"):
            await asyncio.sleep(0.05)
    return job


def kept(cache: Path) -> set[str]:
    """Without the progress of a job, which goes a moment after its end is told."""
    return {name for name in files(cache) if not name.endswith(".progress")}


async def test_a_variant_is_built_once_and_then_served_by_its_name(tmp_path: Path, tiny_chat: Path) -> None:
    async with application(tmp_path, folder_model(tiny_chat)) as app, client(app) as http:
        order = {"model": "tiny", "recipe": "q6_k"}
        response = await http.post("/quantize", json=order)
        assert response.status_code == 202
        job = await finished(http, response.json()["id"])
        assert (job["state"], job["outcome"], job["variant"]) == ("done", "built", "tiny:q6_k")
        before = kept(tmp_path / "cache")
        again = (await http.post("/quantize", json=order)).json()
        assert (again["state"], again["outcome"], again["variant"]) == ("done", "cached", "tiny:q6_k")
        assert kept(tmp_path / "cache") == before
        assert [one["id"] for one in (await http.get("/quantize")).json()["data"]] == [job["id"]]
        response = await http.post("/v1/chat/completions", json=chat(model="tiny:q6_k"))
        assert response.status_code == 200, response.text
        assert response.headers["x-variant"] == "tiny:q6_k"
        card = (await http.get("/v1/models/tiny")).json()
        assert "tiny:q6_k" in card["variants"]


async def test_a_torch_format_is_built_by_a_job_and_served(tmp_path: Path, tiny_chat: Path) -> None:
    async with application(tmp_path, folder_model(tiny_chat)) as app, client(app) as http:
        response = await http.post("/quantize", json={"model": "tiny", "recipe": "w8a16"})
        assert response.status_code == 202, response.text
        job = await finished(http, response.json()["id"])
        assert (job["state"], job["error"], job["variant"]) == ("done", None, "tiny:w8a16")
        async with asyncio.timeout(100):
            while (
                response := await http.post("/v1/chat/completions", json=chat(model="tiny:w8a16"))
            ).is_error:
                assert error_of(response)["code"] == "model_loading", response.text
        assert response.headers["x-variant"] == "tiny:w8a16"
        assert response.json()["choices"][0]["message"]["content"]


async def test_a_running_job_is_stopped_and_leaves_nothing(tmp_path: Path, tiny_chat: Path) -> None:
    async with application(tmp_path, folder_model(tiny_chat)) as app, client(app) as http:
        id = (await http.post("/quantize", json={"model": "tiny", "recipe": "q4_k_m"})).json()["id"]
        stopped = (await http.delete(f"/quantize/{id}")).json()
        assert stopped["state"] == "cancelled"
        left = {name for name in files(tmp_path / "cache") if name.startswith(("variants/", "scratch/"))}
        assert left == set()


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "none", "recipe": "q6_k"}, 404, "model"),
        ({"model": "toy", "recipe": "q9_z"}, 400, "recipe"),
        ({"model": "toy", "recipe": "/etc/passwd"}, 400, "recipe"),
        ({"model": "toy", "recipe": "http://127.0.0.1/x"}, 400, "recipe"),
        ({"model": "/etc/passwd", "recipe": "q6_k"}, 400, "model"),
        ({"model": "http://127.0.0.1/x", "recipe": "q6_k"}, 400, "model"),
        ({"model": "../toy", "recipe": "q6_k"}, 400, "model"),
        ({"model": "org/toy", "recipe": "q6_k"}, 404, "model"),
        ({"model": "toy", "recipe": {"type": "q6_k", "imatrix": "x"}}, 400, "recipe"),
        ({"model": "toy", "recipe": {"method": "awq", "format": "gptq"}}, 400, "recipe"),
        (
            {
                "model": "toy",
                "recipe": {"method": "gptq", "format": "gptq", "calibration": {"corpus": "/etc/passwd"}},
            },
            400,
            "recipe",
        ),
        ({"model": "toy:q4_0", "recipe": "q6_k"}, 400, "model"),
        ({"model": "toy"}, 400, "recipe"),
        ({"model": "toy", "recipe": "q6_k", "gate": {}}, 400, "gate"),
        ({"model": "toy", "recipe": "q6_k", "target": {"max_kl": 0.1}}, 400, "recipe"),
        ({"model": "toy", "target": {"passwd": 1}}, 400, "target"),
        ({"model": "toy", "target": {"max_kl": "passwd"}}, 400, "target"),
        ({"model": "toy", "target": {"max_kl": 0.1}}, 400, "target"),  # its backend opens no mixtures
    ],
)
async def test_only_known_models_and_recipes_are_taken(
    http: httpx.AsyncClient, fields: dict[str, object], status: int, param: str
) -> None:
    response = await http.post("/quantize", json=fields)
    assert response.status_code == status
    error = error_of(response)
    assert error["param"] == param
    assert "passwd" not in error["message"]


async def test_a_target_is_a_durable_job_whose_answer_says_that_none_meets_it(tmp_path: Path) -> None:
    order = {"model": "tiny", "target": {"max_bytes": 1000}}
    model = folder_model(write_checkpoint(tmp_path / "source"))
    async with application(tmp_path, model) as app, client(app) as http:
        response = await http.post("/quantize", json=order)
        assert response.status_code == 202, response.text
        assert response.json()["kind"] == "search"
        assert (await http.post("/quantize", json=order)).json()["id"] == response.json()["id"]
    async with application(tmp_path, model) as app, client(app) as http:  # goes on
        job = await finished(http, response.json()["id"])
        assert (job["state"], job["outcome"], job["error"]) == ("done", "searched", None)
        assert job["found"]["winner"] is None
        assert "1,000 bytes" in job["found"]["why"]


async def test_a_first_stream_is_kept_alive_while_its_variant_is_built(
    tmp_path: Path, tiny_chat: Path
) -> None:
    model = folder_model(tiny_chat)
    async with application(tmp_path, model, ping_s=0.05) as app, client(app) as http:
        response = await http.post("/v1/chat/completions", json=chat(model="tiny", stream=True))
    assert response.status_code == 200
    assert response.headers["x-variant"] == "tiny:q8_0"
    assert response.text.startswith(": ping\n\n: ping\n\n")
    chunks = events(response.text)
    assert chunks[0]["system_fingerprint"].startswith("tiny:q8_0@")
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


async def test_a_plain_request_waits_so_long_and_is_then_told_which_job_to_watch(
    tmp_path: Path, tiny_chat: Path
) -> None:
    model = folder_model(tiny_chat)
    async with application(tmp_path, model, build_wait_s=0.3) as app, client(app) as http:
        response = await http.post("/v1/chat/completions", json=chat(model="tiny"))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        error = error_of(response)
        [job] = (await http.get("/quantize")).json()["data"]
        assert error["code"] == "model_loading"
        assert job["id"] in error["message"]
        assert (await finished(http, job["id"]))["state"] == "done"
        async with asyncio.timeout(60):
            while (response := await http.post("/v1/chat/completions", json=chat(model="tiny"))).is_error:
                assert error_of(response)["code"] == "model_loading"
        assert response.json()["choices"][0]["message"]["content"]
