"""Host headers: this machine's names get in, names that were pointed at it do not."""

from pathlib import Path

import pytest

from server.api.hosts import Hosts
from server.settings import Settings
from tests.server.api.support import error_of, serving


@pytest.mark.parametrize(
    ("settings", "host", "allowed"),
    [
        (Settings(), "localhost", True),
        (Settings(), "LocalHost:8000", True),
        (Settings(), "localhost.:8000", True),
        (Settings(), "a.localhost", True),
        (Settings(), "127.0.0.1:8000", True),
        (Settings(), "[::1]:8000", True),
        (Settings(), "evil.example", False),
        (Settings(), "localhost.evil.example", False),
        (Settings(), "10.0.0.7", False),
        (Settings(), "", False),
        (Settings(), "localhost/health", False),
        (Settings(), "localhost:x", False),
        (Settings(), "evil.example@localhost", False),
        (Settings(allowed_hosts=("llm.example",)), "llm.example", True),
        (Settings(allowed_hosts=("llm.example",)), "other.example", False),
        (Settings(allowed_hosts=("*",)), "any.example", True),
        (Settings(allowed_hosts=("*",)), "any.example/health", False),
        (Settings(host="box.lan"), "box.lan:8000", True),
        (Settings(host="0.0.0.0"), "10.0.0.7:8000", True),
        (Settings(host="0.0.0.0"), "evil.example", False),
        (Settings(host="0.0.0.0"), "localhost:8000", True),
        (Settings(host="::"), "[fe80::1]:8000", True),
    ],
)
def test_hosts(settings: Settings, host: str, allowed: bool) -> None:
    assert Hosts.of(settings).allow([host]) is allowed


def test_no_header_is_what_old_clients_send_and_two_are_a_trick() -> None:
    hosts = Hosts.of(Settings())
    assert hosts.allow([])
    assert not hosts.allow(["localhost", "localhost"])


async def test_a_foreign_host_gets_an_error_on_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        for path in ("/health", "/v1/models", "/nope", "/metrics"):
            response = await http.get(path, headers={"host": "evil.example"})
            assert response.status_code == 400
            assert error_of(response)["code"] == "invalid_host"
            assert "evil" not in response.text
