"""Checkpoints that others quantized are served as they are, by the backend of their format."""

import json
from pathlib import Path

import pytest

from server.catalog import CatalogError, model_from_source
from server.types import Generate, Grammar, SamplingParams
from tests.server.backends.torch_.quantized import write
from tests.server.pool.support import answer, running


async def test_a_quantized_folder_is_served_without_a_build(tiny_chat: Path, tmp_path: Path) -> None:
    write(tmp_path / "tiny-awq", tiny_chat, "awq")
    model = model_from_source("tiny-awq", tmp_path)
    assert (model.default, model.is_ready) == ("awq", True)
    async with running(tmp_path / "cache", model) as pool, pool.acquire("tiny-awq", wait_s=120) as lease:
        assert lease.variant.id == "tiny-awq:awq"
        assert (lease.variant.backend, lease.variant.label) == ("awq", "unmeasured")
        assert len(await answer(lease)) == 8
        grammar = Grammar(kind="regex", text="(yes|no)")
        wanted = SamplingParams(max_tokens=4, temperature=0.0)
        request = Generate(id="g", prompt=(1, 2, 3), params=wanted, grammar=grammar)
        tokens = [token async for event in lease.engine.generate(request) for token in event.tokens]
        said = b"".join(lease.text.pieces[t] for t in tokens if t not in lease.text.end_ids)
        assert said in (b"yes", b"no")
        assert pool.states()[0].variants == ("tiny-awq:awq",)
    assert not (tmp_path / "cache" / "variants").exists()


def test_a_format_that_nobody_reads_is_refused_at_the_start(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogError, match="hqq"):
        model_from_source(str(tmp_path))
