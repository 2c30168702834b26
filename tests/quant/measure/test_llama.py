"""GGUF files as scorers: exact ones say what the checkpoint says, coarser ones are further off."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import transformers

from quant.gguf.kquant import quantize
from quant.measure.llama import gguf_scorer
from quant.measure.perplexity import ppl_2048, ppl_llamacpp, ppl_window
from quant.measure.score import Reference, compare, reference
from quant.measure.text import Corpus, chunked
from quant.recipe import GgufRecipe
from tests.quant.gguf.support import checkpoint, converted
from tests.quant.gguf.support import reference as torch_logits

CORPUS = Corpus(
    tokens=tuple(int(token) for token in np.random.default_rng(5).integers(0, 400, 1100)),
    digest="0" * 64,
    tokenizer="1" * 64,
    begins_with=0,
)
TEXT = chunked(CORPUS, 64).first_chunks(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(
        tmp_path_factory.mktemp("source"), transformers.LlamaForCausalLM, max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return converted(folder, folder / "base.gguf")


@pytest.fixture(scope="module")
def source(folder: Path) -> Reference:
    return reference(lambda tokens: torch_logits(folder, tokens), TEXT)


def test_the_same_weights_are_no_distance_apart(base: Path, source: Reference) -> None:
    with gguf_scorer(base, context=TEXT.longest, threads=1) as scorer:
        score = compare(scorer, source).score()
        assert score.mean.value < 1e-6
        assert score.top1.value > 0.99
        assert abs(score.log_perplexity_change.value) < 1e-4
        own = reference(scorer, TEXT)
        assert compare(scorer, own).score().max == 0


def test_fewer_bits_are_further_off(base: Path, source: Reference, tmp_path: Path) -> None:
    found = []
    for kind in ("q8_0", "q5_0", "q4_0"):
        target = tmp_path / f"{kind}.gguf"
        quantize(base, target, GgufRecipe(type=kind), progress=lambda _done, _total: None, threads=1)
        with gguf_scorer(target, context=TEXT.longest, threads=1) as scorer:
            found.append(compare(scorer, source))
    for fine, coarse in itertools.pairwise(found):
        difference = coarse.further_than(fine)
        assert difference.value > 2 * difference.error > 0


def test_perplexities_by_their_definitions(base: Path) -> None:
    with gguf_scorer(base, context=1024, threads=1) as scorer:
        mine = ppl_llamacpp(scorer, CORPUS)
        window = ppl_window(scorer, CORPUS, size=256, stride=128)
        losses = []
        for start in (0, 512):
            tokens = [0, *CORPUS.tokens[start + 1 : start + 512]]
            logits = scorer(tokens).astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            losses += [-logs[at, tokens[at + 1]] for at in range(256, 511)]
        with pytest.raises(Exception, match="1,100 tokens, too few"):
            ppl_2048(scorer, CORPUS)
    assert mine.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert mine.error == pytest.approx(mine.value * np.std(losses) / math.sqrt(509), rel=1e-3)
    assert mine.tokens == 510
    assert window.tokens == 1099
    assert "windows of 256 tokens, stride 128; 1,099 tokens scored" in str(window)
