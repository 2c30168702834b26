"""The device's choices against the llama backend's and against probabilities written out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.backends.llama.sampling import Sampler
from server.backends.llama.sampling import score as score_of
from server.backends.torch_.sampling import Choice, Drawer, choose, score, top_ids
from server.types import SamplingParams
from tests.server.backends.llama.support import Line, params

VOCAB = 400  # more than `FEW`


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """Peaked, with ties."""
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return (values * 12).round() / 4


def choice(wanted: SamplingParams, line: Line, draw: int = 0) -> Choice:
    return Choice(Drawer(line, VOCAB), line.tokens, len(line.tokens), draw, 0)


def chosen(logits: torch.Tensor, choices: Sequence[Choice], last: torch.Tensor | None = None) -> list[int]:
    last = torch.zeros(1, dtype=torch.int64) if last is None else last
    found: list[int] = choose(logits, logits.argmax(-1), choices, last).tolist()
    return found


def line(wanted: SamplingParams, tokens: Sequence[int], prompt: int) -> Line:
    return Line(list(tokens), wanted, prompt_tokens=prompt)


biases = st.lists(st.tuples(st.integers(0, VOCAB + 5), st.floats(-100, 100, width=32)), max_size=4)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from((1.0, 1.2, 0.8)),
        "frequency_penalty": st.sampled_from((0.0, 0.7, -0.5)),
        "presence_penalty": st.sampled_from((0.0, 1.1)),
        "logit_bias": biases.map(tuple),
    }
)
texts = st.lists(st.integers(0, 20), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(penalties, texts, st.integers(0, 999)), min_size=1, max_size=5))
def test_bias_and_penalties_move_the_best_token_as_in_the_llama_backend(
    rows: list[tuple[dict[str, object], list[int], int]],
) -> None:
    lines = [line(params(**wanted), text, 1 + seed % len(text)) for wanted, text, seed in rows]
    logits = torch.cat([logits_of(seed) for _, _, seed in rows])
    found = chosen(logits, [choice(one.params, one) for one in lines])
    scratch = np.zeros(VOCAB, np.float32)
    for one, row, token in zip(lines, logits, found, strict=True):
        sampler = Sampler(one.params, one.prompt_tokens, scratch)
        wanted = sampler.choose(row.numpy(), one.tokens, len(one.tokens), 0)
        if wanted != token:  # the same sums in another order
            values = sampler._adjusted(row.numpy(), one.tokens, len(one.tokens))
            assert values[token] == pytest.approx(values[wanted], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(penalties, texts, st.integers(0, 20), st.integers(0, 999))
def test_a_token_that_only_the_device_knows_is_penalized_like_the_others(
    wanted: dict[str, object], text: list[int], flying: int, seed: int
) -> None:
    known = line(params(**wanted), [*text, flying], 1 + seed % len(text))
    late = Line(text, known.params, prompt_tokens=known.prompt_tokens)
    waiting = Choice(Drawer(late, VOCAB), late.tokens, len(text) + 1, 0, 0)
    logits = logits_of(seed)
    assert chosen(logits, [waiting], torch.tensor([flying])) == chosen(logits, [choice(known.params, known)])


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    st.integers(0, 999),
    st.sampled_from((0.0, 1.0)),
)
def test_only_what_a_mask_allows_is_chosen(allowed: set[int], seed: int, temperature: float) -> None:
    """Also where the mask is shorter than the vocabulary, and not for the rows beside it."""
    one = line(params(temperature=temperature, seed=seed), [1, 2], 1)
    bits = sum(1 << token for token in allowed).to_bytes(max(allowed) // 8 + 1, "little")
    logits = logits_of(seed, 2)
    masked = replace(choice(one.params, one), mask=bits)
    free = choice(one.params, one)
    first, second = chosen(logits, [masked, free])
    assert first in allowed
    assert second == chosen(logits[1:], [free])[0]
    if not temperature:
        assert first == max(allowed, key=lambda token: (float(logits[0, token]), -token))


def probabilities(logits: NDArray[np.float64], wanted: SamplingParams) -> NDArray[np.float64]:
    """The definition: temperature, top-k, top-p, min-p, each on what the one before left."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = np.exp((logits[order] - logits.max()) / wanted.temperature)
    weights[wanted.top_k or len(weights) :] = 0
    if wanted.top_p < 1:
        weights[np.cumsum(weights) - weights >= wanted.top_p * weights.sum()] = 0
    weights[weights < wanted.min_p] = 0
    out = np.zeros(len(logits))
    out[order] = weights / weights.sum()
    return out


CUTS: dict[str, dict[str, float]] = {
    "none": {},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 7},
    "wide top_k": {"top_k": 300},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.02},
    "all": {"temperature": 1.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    "only one": {"top_k": 1},
}


@pytest.mark.parametrize("cut", CUTS)
def test_points_fall_on_tokens_as_often_as_the_cut_distribution_says(
    cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly spaced points in place of random ones; each row is alone in having its point."""
    points = 4000
    monkeypatch.setattr("server.backends.torch_.sampling.uniform", lambda _, draw: (draw + 0.5) / points)
    wanted = params(**({"temperature": 1.0} | CUTS[cut]))
    one, logits = line(wanted, [1], 1), logits_of(11) / 3
    found = chosen(logits.expand(points, -1), [choice(wanted, one, draw) for draw in range(points)])
    share = np.bincount(found, minlength=VOCAB) / points
    expected = probabilities(logits[0].double().numpy(), wanted)
    assert np.abs(share - expected).max() <= 2 / points
    assert not share[expected == 0].any()


def test_a_rows_choice_does_not_depend_on_its_company() -> None:
    """Rows of every kind together, each as it is alone."""
    kinds: list[dict[str, float]] = [*CUTS.values(), {"temperature": 0.0}, {"frequency_penalty": 1.0}]
    choices = []
    for seed, kind in enumerate(kinds * 3):
        wanted = params(**({"temperature": 0.9, "seed": seed} | kind))
        choices.append(choice(wanted, line(wanted, [seed, 1, seed], 1), draw=seed))
    logits = logits_of(4, len(choices)) / 2
    alone = [chosen(logits[row : row + 1], [one])[0] for row, one in enumerate(choices)]
    assert chosen(logits, choices) == alone
    assert len(set(alone)) > 10


@pytest.mark.parametrize("count", [1, 20, VOCAB])
def test_the_most_likely_tokens_come_in_order_the_lower_id_first(count: int) -> None:
    logits = logits_of(3, 5)
    expected = [np.argsort(-row.numpy(), kind="stable")[:count].tolist() for row in logits]
    assert top_ids(logits, count).tolist() == expected


def test_scores_are_those_of_the_llama_backend() -> None:
    logits, tokens = logits_of(6, 4), torch.tensor([0, 5, 399, 7])
    found = score(logits, tokens, 20).read([20, 0, 3, 1])
    for row, token, count, ours in zip(logits, tokens.tolist(), (20, 0, 3, 1), found, strict=True):
        theirs = score_of(row.numpy(), token, count, np.zeros(VOCAB, np.float32))
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)
