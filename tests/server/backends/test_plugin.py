"""A backend from a package of its own, as docs/adding-a-backend.md tells to write it."""

import re
import sys
from pathlib import Path

import pytest

from server.backends import registry
from server.cli import doctor
from server.errors import RequestError
from server.pool.pool import Lease
from server.types import Generate, SamplingParams, Tokens
from tests.server.pool.support import running, toy, write_gguf

DOCS = Path(__file__).parents[3] / "docs" / "adding-a-backend.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


def install(
    site: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch, entry: str | None = None
) -> None:
    info = site / f"{name}_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}_backend.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{registry.GROUP}]\n{name} = {entry or f'{name}_backend:BACKEND'}\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(site), *filter(None, sys.path)]))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind when it installs such a package, for this process and those that it starts."""
    (entry,) = re.findall(r"^echo = \"(.*)\"$", blocks("toml")[0], re.MULTILINE)
    assert entry.startswith("echo_backend:")
    install(tmp_path / "site", "echo", blocks("python")[0], monkeypatch, entry)


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


def test_a_broken_package_leaves_the_other_backends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "a_broken", "import no_such_module", monkeypatch)  # asked before all others
    assert registry.names()[0] == "a_broken"
    with pytest.raises(RequestError, match="'a_broken' cannot be loaded: ModuleNotFoundError"):
        registry.load("a_broken")
    assert registry.for_format("gguf").name == "llama"
    with pytest.raises(RequestError, match="cannot be loaded"):
        registry.for_format("no such format")
    assert any("'a_broken' cannot be loaded" in finding.text for finding in doctor._backends())


def test_a_backend_that_does_not_open_the_format_is_told_so() -> None:
    assert registry.require("llama", "gguf").name == "llama"
    with pytest.raises(RequestError, match=r"'plain' does not open format 'gguf'; it opens .*plain"):
        registry.require("plain", "gguf")
