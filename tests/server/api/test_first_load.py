"""The first request for a variant of every format: built by `quant` into the store, loaded, and answered.

(w8a16, which a job builds, is in test_admin.)
"""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from quant.store import VariantStore
from server.catalog import Model
from tests.quant.stream.checkpoints import decoded, family_checkpoint, logits_of
from tests.server.api.support import COMPLETIONS, application, client

# name -> format, and the backend that serves it
FORMATS = {
    "bf16": ("gguf", "llama"),
    "nf4": ("bnb4", "bitsandbytes"),
    "fp4": ("bnb4", "bitsandbytes"),
    "int8": ("bnb8", "bitsandbytes"),
    "awq-w4g128": ("awq", "awq"),
    "gptq-w4g128": ("gptq", "gptq"),
    "gptq-w8g128": ("gptq", "gptq"),
    "w4a16": ("compressed-tensors", "compressed"),
    "w8a8": ("compressed-tensors-int8", "compressed"),
}
ROUNDED = {"int8", "w8a8"}  # whose activations are rounded, too
PROMPT = [7, 60, 90, 31, 200, 118, 64, 33, 101, 45, 12, 250]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of Qwen2, with biases and a head of its own."""
    return family_checkpoint(tmp_path_factory.mktemp("source") / "tiny", "Qwen2ForCausalLM")


async def logprobs(http: httpx.AsyncClient) -> list[float]:
    """Of the prompt's tokens after the first, from a plain request that waits for everything."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    response = await http.post(COMPLETIONS, json=body, timeout=300)
    assert response.status_code == 200, response.text
    found: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert len(found) == len(PROMPT) + 1
    return found[1:-1]


def expected(source: Path, variant: Path, form: str) -> list[float]:
    """The same by transformers with the weights that the variant's codes mean."""
    tokens = torch.tensor([PROMPT])
    if form == "gguf":  # the source's own, in bf16
        table = logits_of(source, tokens=tokens)[0].log_softmax(-1)
    else:
        table = logits_of(variant, decoded(variant, form), tokens)[0].log_softmax(-1)
    return [float(row[token]) for row, token in zip(table, PROMPT[1:], strict=False)]


@pytest.mark.parametrize("name", FORMATS)
async def test_the_first_request_builds_and_the_next_server_finds(
    name: str, source: Path, tmp_path: Path
) -> None:
    form, backend = FORMATS[name]
    fields: dict[str, Any] = {"variants": (name,), "default": name, "context": 32, "parallel": 2}
    model = Model(id="m", source=str(source), **fields)
    async with application(tmp_path, model) as app, client(app) as http:
        found = await logprobs(http)
        (job,) = (await http.get("/quantize")).json()["data"]
        assert (job["state"], job["outcome"], job["variant"]) == ("done", "built", f"m:{name}")
        card = (await http.get("/v1/models/m")).json()
        assert (card["variants"], card["backend"]) == ([f"m:{name}"], backend), card
    (variant,) = VariantStore(tmp_path / "cache").list()
    assert (variant.manifest.recipe.name, variant.manifest.format) == (name, form)
    near = 0.5 if name in ROUNDED else 0.05 if form == "gguf" else 2e-4
    assert found == pytest.approx(expected(source, variant.path, form), abs=near)
    async with application(tmp_path, model) as app, client(app) as http, asyncio.timeout(20):
        while (await http.get("/v1/models/m")).json()["variants"] != [f"m:{name}"]:
            await asyncio.sleep(0.05)
