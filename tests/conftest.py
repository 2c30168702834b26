"""Models that several tests share. Each is built once in a session, through the real pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.pipeline import build_variant
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_chat() -> Path:
    """The bundled model: a Hugging Face folder, 16 M parameters, bf16."""
    return REPO / "models" / "tiny-chat"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A file or folder of the material that is not committed; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = REPO.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"{name} is not here")
        return path

    return find


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(cache: Path, source: Path, recipe: str) -> Path:
    opened = open_source(str(source), cache=cache)
    outcome = build_variant(opened, parse_recipe(recipe), VariantStore(cache), progress=lambda _: None)
    return outcome.variant.path


@pytest.fixture(scope="session")
def gguf_f32(session_cache: Path, tiny_chat: Path) -> Path:
    """Variant folder of tiny-chat, F32 GGUF."""
    return build(session_cache, tiny_chat, "f32")


@pytest.fixture(scope="session")
def gguf_q4(session_cache: Path, tiny_chat: Path) -> Path:
    """Variant folder of tiny-chat, Q4_K_M."""
    return build(session_cache, tiny_chat, "q4_k_m")
