"""Executors over tiny-chat, opened once. Tests leave all slots empty."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.backends.llama.backend import LLAMA, LlamaOpened
from server.backends.llama.native import load_library
from server.types import Open


def open_model(variant: Path, **changes: object) -> LlamaOpened:
    spec: dict[str, object] = {"backend": "llama", "context": 256, "parallel": 16, "threads": 1}
    return LLAMA.open(Open(variant=str(variant), **(spec | changes)), lambda _: None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def f32(gguf_f32: Path) -> Iterator[LlamaOpened]:
    """F32 weights and F32 KV: nothing but the order of sums separates two ways to compute the same."""
    opened = open_model(gguf_f32 / "model.gguf", options={"kv_type": "f32"})
    yield opened
    opened.executor.close()


@pytest.fixture(scope="session")
def f32_default(gguf_f32: Path) -> Iterator[LlamaOpened]:
    """F32 weights as they are served where nobody says how."""
    opened = open_model(gguf_f32 / "model.gguf")
    yield opened
    opened.executor.close()


@pytest.fixture(scope="session")
def f32_shared(gguf_f32: Path) -> Iterator[LlamaOpened]:
    """As `f32`, with less memory than a context for every slot: all slots share it."""
    opened = open_model(gguf_f32 / "model.gguf", kv_tokens=2048, options={"kv_type": "f32"})
    yield opened
    opened.executor.close()


@pytest.fixture(params=["f32", "f32_shared"])
def either(request: pytest.FixtureRequest) -> LlamaOpened:
    """Both layouts of KV memory, one after the other."""
    opened: LlamaOpened = request.getfixturevalue(request.param)
    return opened


@pytest.fixture(scope="session")
def q4(gguf_q4: Path) -> Iterator[LlamaOpened]:
    opened = open_model(gguf_q4 / "model.gguf")
    yield opened
    opened.executor.close()


@pytest.fixture(scope="session")
def q4_deterministic(gguf_q4: Path) -> Iterator[LlamaOpened]:
    opened = open_model(gguf_q4 / "model.gguf", options={"deterministic": "true"})
    yield opened
    opened.executor.close()


@pytest.fixture(scope="session")
def q4_exact(gguf_q4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaOpened]:
    """The weights that Q4_K_M stores, multiplied in F32."""
    library, target = load_library(), tmp_path_factory.mktemp("exact") / "model.gguf"
    how = library.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = library.LLAMA_FTYPE_ALL_F32, True, 1
    assert library.llama_model_quantize(bytes(gguf_q4 / "model.gguf"), bytes(target), how) == 0
    opened = open_model(target, options={"kv_type": "f32"})
    yield opened
    opened.executor.close()
