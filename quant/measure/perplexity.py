"""Perplexity by three definitions, each under its own name, with all that it depends on."""

import math
from dataclasses import dataclass

import numpy as np

from quant.measure.estimate import mean
from quant.measure.score import Scorer, surprises
from quant.measure.text import Corpus, Text, chunked, halves, windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    name: str
    value: float
    error: float  # one standard error
    tokens: int  # scored
    cut: str
    corpus: str  # sha256
    tokenizer: str  # sha256 of tokenizer.json

    def __str__(self) -> str:
        return (
            f"{self.name} {self.value:.4f} ± {self.error:.4f} ({self.cut}; {self.tokens:,} tokens scored; "
            f"text {self.corpus[:8]}, tokenizer {self.tokenizer[:8]})"
        )


def ppl_2048(scorer: Scorer, corpus: Corpus) -> Perplexity:
    """As in the GPTQ and AWQ papers. Only for models whose context holds 2,048 tokens."""
    return _of("ppl_2048", scorer, chunked(corpus, 2048))


def ppl_llamacpp(scorer: Scorer, corpus: Corpus) -> Perplexity:
    """As llama-perplexity prints it, also its error, which takes tokens for independent."""
    text = halves(corpus, 512)
    values = np.concatenate(surprises(scorer, text)).astype(np.float64)
    spread = math.sqrt(max(float(np.mean(values**2) - np.mean(values) ** 2), 0.0) / (len(values) - 1))
    value = math.exp(float(np.mean(values)))
    return _about("ppl_llamacpp", value, spread * value, text)


def ppl_window(scorer: Scorer, corpus: Corpus, size: int = 1024, stride: int = 512) -> Perplexity:
    """Each token once, with at least `size - stride` tokens before it but in the first window."""
    return _of("ppl_window", scorer, windows(corpus, size, stride))


def _of(name: str, scorer: Scorer, text: Text) -> Perplexity:
    estimate = mean(surprises(scorer, text))
    value = math.exp(estimate.value)
    return _about(name, value, value * estimate.error, text)


def _about(name: str, value: float, error: float, text: Text) -> Perplexity:
    return Perplexity(
        name=name,
        value=value,
        error=error,
        tokens=text.scored,
        cut=text.cut,
        corpus=text.corpus,
        tokenizer=text.tokenizer,
    )
