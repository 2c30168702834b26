"""Each architecture of both tables: built for llama.cpp, bitsandbytes and compressed-tensors, and served."""

from pathlib import Path
from typing import Any

import pytest

from quant.families import FAMILIES
from quant.gguf.families import FAMILIES as GGUF_FAMILIES
from quant.recipe import TORCH_PRESETS
from server.backends.base import Backend
from server.backends.registry import for_format
from server.types import Generate, Open, SamplingParams
from tests.quant.methods.models import ARCHITECTURES
from tests.quant.stream.checkpoints import build, family_checkpoint
from tests.server.backends.torch_.support import Answer, Reference, serve

QUICK = {**TORCH_PRESETS["w4a16"].spec, "options": {"ratios": 3, "tokens": 128}}
RECIPES: dict[str, object] = {"f32": "f32", "q4_k_m": "q4_k_m", "nf4": "nf4", "w4a16": QUICK}
MODEL_FILE = {"gguf": "model.gguf"}
LOSS = {"f32": 1e-2, "q4_k_m": 2.0, "nf4": 2.0, "w4a16": 2.0}  # mean difference; random weights lose much
PROMPTS = [tuple(range(3 + n, 43 + n)) for n in range(3)]


def test_both_tables_have_the_same_rows() -> None:
    assert FAMILIES.keys() == GGUF_FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint(tmp_path_factory.mktemp("source") / "model", request.param)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_builds_and_generates(source: Path, recipe: str, tmp_path: Path) -> None:
    variant = build(source, RECIPES[recipe], tmp_path).variant
    form = variant.manifest.format
    answers = answers_of(for_format(form), variant.path / MODEL_FILE.get(form, ""))
    reference = Reference.of(source)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert not answer.error
        assert len(answer.tokens) == 8
        differences = reference.differences(prompt, answer)
        assert sum(differences) / len(differences) < LOSS[recipe]


def answers_of(backend: Backend, variant: Path) -> list[Answer]:
    options: dict[str, Any] = {} if backend.name == "llama" else {"device": "cpu"}
    spec = Open(
        variant=str(variant), backend=backend.name, context=64, parallel=3, threads=1, options=options
    )
    executor = backend.open(spec, lambda _: None).executor
    wanted = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2, prompt_logprobs=2)
    requests = [Generate(id=str(n), prompt=prompt, params=wanted) for n, prompt in enumerate(PROMPTS)]
    answers, _ = serve(executor, requests)
    executor.close()
    return [answers[request.id] for request in requests]
