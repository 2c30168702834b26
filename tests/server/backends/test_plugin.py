"""A backend from a package of its own, as docs/adding-a-backend.md tells to write it."""

import re
import sys
from pathlib import Path

import pytest

from server.backends import registry
from server.errors import RequestError
from server.pool.pool import Lease
from server.types import Generate, SamplingParams, Tokens
from tests.server.pool.support import running, toy, write_gguf

DOCS = Path(__file__).parents[3] / "docs" / "adding-a-backend.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind when it installs such a package, for this process and those that it starts."""
    site = tmp_path / "site"
    info = site / "echo_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "echo_backend.py").write_text(blocks("python")[0])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-backend\nVersion: 1.0\n")
    (entry,) = re.findall(r"^echo = \"(.*)\"$", blocks("toml")[0], re.MULTILINE)
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\necho = {entry}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(site), *filter(None, sys.path)]))


@pytest.mark.usefixtures("installed")
async def test_a_package_adds_a_backend_that_serves(tmp_path: Path) -> None:
    assert "echo" in registry.names()
    assert registry.load("echo").probe() is None
    model = toy(write_gguf(tmp_path / "model.gguf"), backend="echo", parallel=2)
    async with running(tmp_path / "cache", model) as pool, pool.acquire("toy", wait_s=60) as lease:
        assert lease.variant.backend == "echo"
        prompt = await lease.text.encode("Where is an echo!", add_special=True, parse_special=False)
        assert await answers(lease, prompt) == "!!!!!!!!"


async def answers(lease: Lease, prompt: list[int]) -> str:
    found: list[int] = []
    request = Generate(id="1", prompt=tuple(prompt), params=SamplingParams(max_tokens=8, logprobs=0))
    async for event in lease.engine.generate(request):
        assert isinstance(event, Tokens)
        found += event.tokens
    return b"".join(lease.text.pieces[token] for token in found).decode()


def test_without_the_package_the_name_is_unknown() -> None:
    with pytest.raises(RequestError, match="echo"):
        registry.load("echo")
