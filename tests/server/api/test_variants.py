"""Measured variants over HTTP: refused with figures, named in lists, reported, served anyway, promoted.

The engine is the toy; what was measured is written by hand.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from quant.measure.gate import Gate
from quant.measure.measurement import files_digest, write_measurement
from quant.store import VariantStore
from server.catalog import Model
from server.catalog.gates import Gates
from tests.conftest import build
from tests.quant.checkpoints import write_checkpoint
from tests.quant.measure.measurements import measurement
from tests.server.api.support import CHAT, HELLO, application, client
from tests.server.pool.support import until


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def model(source: Path, gate: Gate | None = None) -> Model:
    return Model(
        id="m",
        source=str(source),
        variants=("f16", "q8_0"),
        default="f16",
        backend="toy-rows",
        context=64,
        gate=Gates(gate or Gate()),
    )


def measured(cache: Path, source: Path, recipe: str, kl: float) -> None:
    folder = build(cache, source, recipe)
    variant = VariantStore(cache).find(folder.name)
    assert variant is not None
    write_measurement(folder, measurement(kl, files=files_digest(variant.manifest), variant=recipe))


@asynccontextmanager
async def serving(folder: Path, model: Model) -> AsyncIterator[httpx.AsyncClient]:
    """Once the server knows what is built."""
    async with application(folder, model) as app, client(app) as http:
        pool = app.state.services.pool
        await until(lambda: len(pool.gatekeeper.of_model(model)) == 2, 20)
        yield http


def chat(name: str) -> dict[str, Any]:
    return {"model": name, "messages": HELLO, "max_tokens": 4}


async def test_a_rejected_variant_is_refused_with_its_figures(tmp_path: Path, source: Path) -> None:
    measured(tmp_path / "cache", source, "f16", 0.001)
    measured(tmp_path / "cache", source, "q8_0", 1.5)
    async with serving(tmp_path, model(source)) as http:
        for _ in range(2):
            answer = await http.post(CHAT, json=chat("m:q8_0"))
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "variant_rejected"
            assert "1.5000" in answer.json()["error"]["message"]
        promoted = await http.post("/admin/variants/m:q8_0/promote")
        assert (promoted.status_code, promoted.json()["error"]["code"]) == (409, "variant_rejected")
        card = (await http.get("/v1/models/m")).json()
        assert card["label"] == "passed"
        assert card["verdicts"]["m:q8_0"].startswith("rejected: mean KL divergence 1.5000")
        assert card["choices"]["auto"]["q8_0"] == "not chosen: the gate rejects it"
        assert card["measurement"]["kl"]["mean"][0] == 0.001
        assert 'quantserve:variant_kl{model="m",variant="q8_0"} 1.5' in (await http.get("/metrics")).text
        found = (await http.get("/admin/report/m:q8_0")).json()
        assert found["verdict"]["state"] == "rejected"
        assert found["command"] == "quantserve measure m --variants q8_0 --again --texts 8 --ctx 1024"
        assert (found["gate"]["max_kl"], found["gate"]["max_kl_p99"]) == (0.3, None)
        page = await http.get("/admin/report/m:q8_0", headers={"accept": "text/html"})
        assert found["source"]["id"] == source.name
        assert not [path for path in (tmp_path, tmp_path.resolve()) if str(path) in str(found) + page.text]
        assert "rejected" in page.text
        assert page.headers["content-type"].startswith("text/html")
        for variant in ("m:q6_k", "x:y"):
            assert (await http.get(f"/admin/report/{variant}")).status_code == 404


async def test_what_is_served_anyway_says_so_in_every_answer(tmp_path: Path, source: Path) -> None:
    measured(tmp_path / "cache", source, "f16", 0.001)
    measured(tmp_path / "cache", source, "q8_0", 1.5)
    async with serving(tmp_path, model(source, Gate(serve_anyway=True))) as http:
        for stream in (False, True):
            answer = await http.post(CHAT, json={**chat("m:q8_0"), "stream": stream})
            assert answer.status_code == 200
            assert "served anyway" in answer.headers["x-gate"]
        assert "x-gate" not in (await http.post(CHAT, json=chat("m"))).headers


async def test_the_bare_name_moves_and_comes_back(tmp_path: Path, source: Path) -> None:
    measured(tmp_path / "cache", source, "f16", 0.001)
    measured(tmp_path / "cache", source, "q8_0", 0.0015)
    async with serving(tmp_path, model(source)) as http:
        assert (await http.post("/admin/variants/m/promote")).status_code == 400
        assert (await http.post("/admin/variants/m/rollback")).status_code == 409
        moved = await http.post("/admin/variants/m:q8_0/promote")
        assert moved.json() == {"model": "m", "variant": "m:q8_0", "before": "m:f16", "label": "passed"}
        assert (await http.post("/admin/variants/m:q8_0/promote")).status_code == 409
    async with serving(tmp_path, model(source)) as http:  # and it lasts
        assert (await http.post(CHAT, json=chat("m"))).headers["x-variant"] == "m:q8_0"
        assert (await http.get("/v1/models/m")).json()["variant"] == "m:q8_0"
        assert (await http.post(CHAT, json=chat("m:best"))).headers["x-variant"] == "m:f16"
        back = await http.post("/admin/variants/m/rollback")
        assert back.json()["variant"] == "m:f16"
        assert (await http.post(CHAT, json=chat("m"))).headers["x-variant"] == "m:f16"
