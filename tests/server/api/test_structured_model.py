"""Answers of a given form by a real model, at temperature 1: whatever ends, is valid."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.structured import Asking, Tally, try_calls, try_schemas
from server.catalog import Model
from tests.server.api.support import application, client


@pytest.fixture
async def asking(gguf_q4: Path, tmp_path: Path) -> AsyncIterator[Asking]:
    source = str(gguf_q4 / "model.gguf")
    model = Model(id="tiny", source=source, variants=(), default="q4_k_m", context=1024, parallel=4)
    async with application(tmp_path, model) as app, client(app) as http:
        http.base_url = http.base_url.join("/v1/")
        yield Asking(http, "tiny", max_tokens=256)


def check(tally: Tally, complete: float) -> None:
    assert tally.invalid == []
    assert tally.complete >= complete * tally.accepted


async def test_schemas(asking: Asking) -> None:
    tally = await try_schemas(asking, range(12), width=4)
    assert tally.accepted >= 9
    check(tally, 0.6)


async def test_forced_calls(asking: Asking) -> None:
    check(await try_calls(asking, range(8), width=4), 0.6)
