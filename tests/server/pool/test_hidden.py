"""Texts for those who ask a model do not say where its source lies."""

import logging
from pathlib import Path

import pytest

from server.catalog import Model
from server.pool.hidden import without_source
from tests.quant.hub_server import serve
from tests.server.api.support import CHAT, application, chat, client, error_of
from tests.server.pool.support import toy, write_gguf

REPO = "zqsecret/zqmodel"


@pytest.mark.parametrize(
    ("text", "source", "revision", "told"),
    [
        ("org/name is not here", "org/name", None, "<source> is not here"),
        ("org/name@v1 and org/name", "org/name", "v1", "<source> and <source>"),
        ("name it org/name:Q4_0, of org/name", "org/name:Q8_0", None, "name it <source>:Q4_0, of <source>"),
        ("http://hub/org/name/x.json", "org/name", None, "http://hub/<source>/x.json"),
        ("/home/hf/models--org--name/x", "org/name", None, "/home/hf/<source>/x"),
        ("org/name-large, my-org/name", "org/name", None, "org/name-large, my-org/name"),
        ("'/data/m/config.json' of /data/m2", "/data/m", None, "'<source>/config.json' of /data/m2"),
        ("m is a word", "/data/m", None, "m is a word"),
        ("my.gguf is cut", "/data/my.gguf", None, "<source> is cut"),
    ],
)
def test_names_of_a_source_are_replaced(text: str, source: str, revision: str | None, told: str) -> None:
    assert without_source(text, source, revision) == told


async def test_a_hub_model_that_cannot_be_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub does not know it. Answers, lists, jobs, their events and the log say so without its name."""
    caplog.set_level(logging.INFO)
    model = Model(id="m", source=REPO, variants=("q8_0",), default="q8_0", context=64)
    with serve({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        async with application(tmp_path, model) as app, client(app) as http:
            answer = await http.post(CHAT, json=chat(model="m"))
            jobs = (await http.get("/quantize")).json()["data"]
            told = [
                (await http.get(f"/quantize/{job['id']}/{what}")).text
                for job in jobs
                for what in ("log", "events")
            ]
            listed = (await http.get("/v1/models")).text + (await http.get("/admin/status")).text
    assert answer.status_code == 503
    assert "hub repository <source>" in error_of(answer)["message"]
    assert {job["kind"] for job in jobs} == {"pull", "build"}
    for text in (answer.text, str(jobs), listed, caplog.text, *told):
        assert "zq" not in text


async def test_a_source_that_has_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_gguf(tmp_path / "zqfile.gguf")
    model = toy(file)
    file.unlink()
    async with application(tmp_path, model) as app, client(app) as http:
        answer = await http.post(CHAT, json=chat())
        listed = (await http.get("/v1/models")).text
    assert (
        error_of(answer)["message"] == "toy:q4_0 cannot be served: its source is not on this machine any more"
    )
    assert "zqfile" not in listed + caplog.text
