"""models.yaml read again: unchanged models go on, others end with their last use, mistakes change nothing."""

from pathlib import Path

from server.catalog import Catalog, CatalogError, Model
from tests.server.api.support import COMPLETIONS, application, client, completion, error_of
from tests.server.pool.support import answer, toy, until, write_gguf


async def test_what_did_not_change_goes_on_and_what_did_is_loaded_anew(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "toy.gguf")
    before = (toy(gguf, context=256), toy(gguf, "gone", context=256))
    after = (toy(gguf, context=256), toy(gguf, "new", context=256))
    found: list[tuple[Model, ...] | CatalogError] = [after]

    def read() -> Catalog:
        if isinstance(found[0], CatalogError):
            raise found[0]
        return Catalog(found[0])

    async with application(tmp_path, *before) as app, client(app) as http:
        services = app.state.services
        object.__setattr__(services, "read_catalog", read)
        for name in ("toy", "gone"):
            assert (await http.post(COMPLETIONS, json=completion(model=name))).status_code == 200
        pids = {engine.served.model: engine.pid for engine in services.pool.engines()}
        async with services.pool.acquire("gone", wait_s=10) as lease:
            told = await http.post("/admin/reload")
            assert told.json() == {"models": ["toy", "new"]}
            assert len(await answer(lease)) == 8
        await until(lambda: lease.engine.dead, 20)
        assert (await http.post(COMPLETIONS, json=completion(model="gone"))).status_code == 404
        assert (await http.post(COMPLETIONS, json=completion(model="new"))).status_code == 200
        assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
        now = {engine.served.model: engine.pid for engine in services.pool.engines()}
        assert now["toy"] == pids["toy"]
        assert "gone" not in now
        found[0] = CatalogError(["models.yaml:3: no such thing", "models.yaml:4: nor this"])
        refused = await http.post("/admin/reload")
        assert refused.status_code == 409
        assert "models.yaml:3: no such thing; models.yaml:4" in error_of(refused)["message"]
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["toy", "new"]


async def test_status_tells_of_engines_memory_and_jobs(tmp_path: Path) -> None:
    async with application(tmp_path) as app, client(app) as http:
        assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
        status = (await http.get("/admin/status")).json()
        [engine] = status["engines"]
        assert (engine["model"], engine["variant"], engine["users"]) == ("toy", "toy:q4_0", 0)
        memory = status["memory"]["ram"]
        assert 0 < memory["held"] <= memory["budget"]
        assert (status["loads_waiting"], status["jobs"]) == (0, {})
        assert (await http.post("/admin/reload")).status_code == 409  # no file was read
