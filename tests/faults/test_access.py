"""R17: who gets in over real sockets, however a path is spelt, and what the time of a refusal tells."""

import gc
import hashlib
import hmac
import math
import random
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator

import pytest

from server.api.auth import Keys
from server.errors import Unauthorized
from tests.faults.servers import Server, amount, serving, told, toy_models

USER, ADMIN = "sk-user-of-the-test", "sk-admin-of-the-test"
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "users").write_text(USER)
    (folder / "admins").write_text(ADMIN)
    keys = {
        "QUANTSERVE_API_KEYS_FILE": str(folder / "users"),
        "QUANTSERVE_ADMIN_KEYS_FILE": str(folder / "admins"),
    }
    with serving(folder, toy_models(folder, parallel=2), **keys) as server:
        yield server


def status(server: Server, method: str, target: str, *headers: str, host: str = "localhost") -> int:
    """Of a request whose target is sent as it is; 0 where the connection is closed without an answer."""
    lines = (f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall("\r\n".join((*lines, "", "")).encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def routes(server: Server) -> list[tuple[str, str]]:
    page = server.http.get("/openapi.json", headers={"Authorization": f"Bearer {USER}"}).json()
    return [
        (method.upper(), re.sub(r"{\w+}", "x", path))
        for path, methods in page["paths"].items()
        for method in methods
    ]


def spellings(path: str) -> list[str]:
    return [
        path,
        f"/{path}",
        path.replace("/", "//"),
        f"{path}/",
        f"{path}%2f",
        path.replace("/", "/./", 1),
        path[:-1] + path[-1].upper(),
        path.upper(),
        f"{path};/health",
        f"{path}?/health",
        f"{path}%00",
        f"{path}%20",
        f"{path}%3f/health",
        f"/health/..{path}",
        f"/health%2f..{path}",
        f"/health/%2e%2e{path}",
        f"/ready{path}",
        f"http://localhost{path}",
        f"http://localhost/health/..{path}",
        f"/x/../health/..{path}",
    ]


def test_no_route_answers_without_a_key_however_it_is_spelt(guarded: Server) -> None:
    every = routes(guarded)
    assert len(every) > 25
    let_in, tried = [], 0
    for method, path in every:
        for target in spellings(path):
            tried += 1
            got = status(guarded, method, target)
            expected = {200, 405} if path in OPEN and target.split("?")[0].endswith(path) else set()
            if got not in {401, *expected}:
                let_in.append((method, target, got))
    told(f"R17: {tried} requests without a key over {len(every)} routes, {len(let_in)} let in")
    assert let_in == []


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/admin/status", "/quantize", "/nope"])
def test_no_host_and_no_header_gets_in(guarded: Server, path: str) -> None:
    """A Host with a path in it once moved the path that a check looked at."""
    for host in ("localhost/health", "x/health?", "localhost#/health", "localhost\\health", "a@b/ready", ""):
        assert status(guarded, "GET", path, host=host) in (400, 401)
    for header in (
        "X-Original-URL: /health",
        "X-Rewrite-URL: /health",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Prefix: /health",
        "Forwarded: for=127.0.0.1",
        "X-HTTP-Method-Override: GET",
        f"Authorization: Basic {USER}",
        f"Cookie: key={USER}",
        f"Authorization: Bearer {USER[:-1]}",
        f"Authorization: Bearer {USER}\r\nAuthorization: Bearer no",
    ):
        got = status(guarded, "GET", path, header)
        assert got == 401 or (header.endswith("Bearer no") and got in (200, 400, 403, 404)), header


def test_users_are_no_administrators(guarded: Server) -> None:
    user, admin = f"Authorization: Bearer {USER}", f"Authorization: Bearer {ADMIN}"
    for method, path in routes(guarded):
        if path.startswith(("/admin", "/quantize")):
            assert status(guarded, method, path, user) == 403
            assert status(guarded, method, path, admin) not in (401, 403)


def test_every_key_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys.of([f"user-{number}" for number in range(5)], ["admin"])
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    for key in ("user-0", "user-4", "admin", "nobody"):
        compared.clear()
        try:
            keys.caller(scope(key))
        except Unauthorized:
            assert key == "nobody"
        assert len(compared) == 6
        assert {one for one, _ in compared} == {hashlib.sha256(key.encode()).digest()}


def scope(key: str) -> dict[str, object]:
    headers = [(b"authorization", f"Bearer {key}".encode())]
    return {"type": "http", "path": "/v1/models", "headers": headers, "client": ("127.0.0.1", 1)}


LETTERS = "0123456789abcdef"
KEY = "0123456789abcdef" * 2
KEYS = Keys.of([KEY], [])
BLOCK = 100  # tries


def wrong_key(rng: random.Random, right: int) -> str:
    """Random but for the first character, which is right (1) or not (0); made in the same way."""
    first = (rng.choice(LETTERS[1:]), KEY[0])[right]
    return first + "".join(rng.choices(LETTERS, k=len(KEY) - 1))


def refuse(asked: dict[str, object]) -> None:
    try:
        KEYS.caller(asked)
    except Unauthorized:
        return
    raise AssertionError("a wrong key was let in")


def leak(asked: dict[str, object]) -> None:
    """The control: stops at the first wrong character."""
    [(_, value)] = asked["headers"]  # type: ignore[misc]
    for one, other in zip(value.removeprefix(b"Bearer "), KEY.encode(), strict=True):  # type: ignore[has-type]
        if one != other:
            return


def difference(check: Callable[[dict[str, object]], None], tries: int) -> float:
    """How much longer keys with a right beginning take than others, in standard errors of the mean.

    Each key is another one, made just before, in random order and after the same work, so that no object, no
    place in memory and no place in the loop has an effect of its own. The mean is that over blocks of tries,
    of which the slowest tenth is dropped on both sides: the machine was busy with something else.
    """
    rng = random.Random(17)
    blocks = [block_difference(check, rng) for _ in range(tries // BLOCK)]
    return statistics.fmean(blocks) / (statistics.stdev(blocks) / math.sqrt(len(blocks)))


def block_difference(check: Callable[[dict[str, object]], None], rng: random.Random) -> float:
    """In nanoseconds."""
    times: dict[int, list[int]] = {0: [], 1: []}
    rights = [0, 1] * BLOCK
    rng.shuffle(rights)
    neutral = scope(wrong_key(rng, 0))
    gc.disable()
    try:
        for right in rights:
            asked = scope(wrong_key(rng, right))
            check(neutral)
            started = time.perf_counter_ns()
            check(asked)
            times[right].append(time.perf_counter_ns() - started)
    finally:
        gc.enable()
    far, near = (statistics.fmean(sorted(values)[: BLOCK * 9 // 10]) for values in times.values())
    return near - far


def test_the_time_of_a_refusal_tells_nothing() -> None:
    """R17, the full form only: a bound on times needs many tries. The control shows that they would do."""
    tries = amount(short=500, full=20_000)
    difference(refuse, 1000)
    found, control = difference(refuse, tries), difference(leak, tries)
    told(f"R17: {tries} tries: a right first byte takes {found:+.2f} standard errors, control {control:+.0f}")
    assert control > 3
    if tries >= 20_000:
        assert abs(found) < 3
