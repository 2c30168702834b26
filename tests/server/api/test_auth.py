"""Keys: who gets in, and that nobody else does, whatever the path or the headers look like."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api.app import ROUTERS
from server.api.auth import Caller, Keys
from server.errors import Unauthorized
from server.settings import Settings
from tests.server.api.support import CHAT, application, chat, client, error_of

USER, ADMIN = "sk-user-1", "sk-admin-1"


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[FastAPI]:
    (tmp_path / "users").write_text(f"# clients\nsk-other\n\n{USER}\n")
    (tmp_path / "admins").write_text(f"{ADMIN}\n")
    files = {"api_keys_file": tmp_path / "users", "admin_keys_file": tmp_path / "admins"}
    async with application(tmp_path, **files) as app:
        yield app


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_every_route_but_the_probes_needs_a_key(guarded: FastAPI) -> None:
    every = [*guarded.routes, *(route for router in ROUTERS for route in router.routes)]
    routes = [(min(route.methods or ()), route.path) for route in every if isinstance(route, APIRoute)]
    assert len(routes) > 12
    async with client(guarded) as http:
        for method, path in [*routes, ("POST", "/v1/embeddings"), ("GET", "/nope")]:
            response = await http.request(method, path)
            if path in ("/health", "/ready"):
                assert response.status_code in (200, 503)
            else:
                assert response.status_code == 401, path
                assert path.startswith("/v1/messages") or error_of(response)["code"] == "invalid_api_key"


async def test_nothing_is_read_before_the_key_is_checked(guarded: FastAPI) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        raise AssertionError("the body was read on")

    async with client(guarded) as http:
        response = await http.post(CHAT, content=body(), headers={"content-type": "text/plain"})
    assert response.status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        f"Basic {USER}", USER, f"bearer{USER}", f"Bearer  {USER} x", f"Bearer {USER} x", "Bearer", "Bearer ",
        f"Bearer {USER[:-1]}", f"Bearer {USER}x", f"Bearer {USER.upper()}", "Bearer \u00e9",
    ],
)  # fmt: skip
async def test_no_other_header_gets_in(guarded: FastAPI, header: str) -> None:
    async with client(guarded) as http:
        response = await http.get("/v1/models", headers={b"authorization": header.encode("latin-1")})
    assert response.status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models", "/v1//models", "/v1/models/", "/V1/models", "/x/../v1/models", "/v1/models%2f",
        "/v1/models;x", "/v1/models?x=/health", "/health/", "/health/../v1/models", "/HEALTH", "//health",
        "/health%00", "/ready/x",
    ],
)  # fmt: skip
async def test_no_spelling_of_a_path_gets_in(guarded: FastAPI, path: str) -> None:
    async with client(guarded) as http:
        response = await http.get(f"http://localhost{path}")
    assert response.status_code == 401


@pytest.mark.parametrize("host", ["/health", "x/health", "x?/health", "x#/health", "test/ready"])
async def test_no_host_header_gets_in(guarded: FastAPI, host: str) -> None:
    async with client(guarded) as http:
        response = await http.get("/v1/models", headers={"Host": host})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_host"


async def test_users_infer_and_administrators_build_too(guarded: FastAPI) -> None:
    async with client(guarded) as http:
        assert (await http.post(CHAT, json=chat(), headers=bearer(USER))).status_code == 200
        assert (await http.post(CHAT, json=chat(), headers=bearer(ADMIN))).status_code == 200
        assert (await http.get("/quantize", headers=bearer(ADMIN))).status_code == 200
        for method, path in (("POST", "/quantize"), ("GET", "/quantize"), ("DELETE", "/quantize/x")):
            response = await http.request(method, path, headers=bearer(USER))
            assert response.status_code == 403
            assert error_of(response)["code"] == "admin_key_required"


async def test_without_any_keys_only_this_machine_may_build(tmp_path: Path) -> None:
    async with application(tmp_path) as app:
        for peer, headers, status in (
            ("127.0.0.1", {}, 200),
            ("127.0.0.1", bearer("anything"), 200),
            ("::1", {}, 200),
            ("10.0.0.7", {}, 403),
            ("127.0.0.1", {"X-Forwarded-For": "10.0.0.7"}, 403),
            ("127.0.0.1", {"Forwarded": "for=10.0.0.7"}, 403),
        ):
            async with client(app, peer) as http:
                assert (await http.get("/quantize", headers=headers)).status_code == status
                assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_user_keys_alone_leave_nobody_to_build(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(USER)
    async with application(tmp_path, api_keys_file=tmp_path / "users") as app, client(app) as http:
        assert (await http.get("/quantize")).status_code == 401
        assert (await http.get("/quantize", headers=bearer(USER))).status_code == 403


async def test_admin_keys_alone_close_only_the_admin_routes(tmp_path: Path) -> None:
    (tmp_path / "admins").write_text(ADMIN)
    async with application(tmp_path, admin_keys_file=tmp_path / "admins") as app, client(app) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/quantize")).status_code == 401
        assert (await http.get("/quantize", headers=bearer(ADMIN))).status_code == 200


def scope(authorization: str | None = None) -> dict[str, object]:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return {"type": "http", "path": "/v1/models", "headers": headers, "client": None}


def test_the_salt_tells_keys_apart_and_is_no_key() -> None:
    keys = Keys()
    one, two = keys.caller(scope("Bearer one")), keys.caller(scope("Bearer two"))
    assert one.salt != two.salt
    assert "one" not in one.salt
    assert keys.caller(scope()) == Caller(salt="", admin=False)
    assert keys.caller(scope("bearer one")) == one


def test_an_empty_keys_file_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.read(Settings(api_keys_file=tmp_path / "keys"))


def test_keys_come_from_files_and_variables_and_may_be_stored_as_their_digests(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"hashed").hexdigest()
    (tmp_path / "keys").write_text(f"plain\nsha256:{digest}\n")
    keys = Keys.read(Settings(api_keys_file=tmp_path / "keys", api_keys=("other",), admin_keys=("root",)))
    for key, admin in (("plain", False), ("hashed", False), ("other", False), ("root", True)):
        assert keys.caller(scope(f"Bearer {key}")).admin is admin
    for stranger in (digest, f"sha256:{digest}"):
        with pytest.raises(Unauthorized):
            keys.caller(scope(f"Bearer {stranger}"))


def test_a_key_of_the_empty_text_is_none() -> None:
    with pytest.raises(Unauthorized):
        Keys.of(["k"], []).caller(scope("Bearer "))
