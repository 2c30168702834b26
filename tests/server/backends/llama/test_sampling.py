"""The sampler against a slow and plain one, and every parameter by what it promises."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.backends.llama.sampling import (
    BadLogits,
    Logits,
    Sampler,
    greedy,
    log_total,
    nucleus,
    pick,
    score,
    top_ids,
    total,
    uniform,
)
from server.types import SamplingParams

QUICK = settings(max_examples=60, deadline=None)
SIZES = st.sampled_from([1, 2, 3, 63, 64, 65, 130, 1000, 4096, 5000, 70_001])
SMALL = st.sampled_from([5, 64, 200, 4200])


def random_logits(size: int, seed: int, spread: float = 3.0, *, coarse: bool = False) -> Logits:
    """`coarse`: many equal values."""
    values = np.random.default_rng(seed).normal(0, spread, size)
    return (np.round(values) if coarse else values).astype(np.float32)


def sampler(size: int, prompt_tokens: int = 0, **changes: object) -> Sampler:
    params = SamplingParams(max_tokens=9, **changes)  # type: ignore[arg-type]  # the fields differ in type
    return Sampler(params, prompt_tokens, np.zeros(size, np.float32))


def distribution(
    logits: Logits, params: SamplingParams, prompt: list[int], answer: list[int]
) -> NDArray[np.float64]:
    """What the parameters mean, step by step, without a thought for speed."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        x[token] += bias
    for token in set(prompt + answer):
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
    for token, count in Counter(answer).items():
        x[token] -= count * params.frequency_penalty + params.presence_penalty
    if params.temperature == 0:
        greedy_choice: NDArray[np.float64] = np.eye(len(x))[int(np.argmax(x))]
        return greedy_choice
    p = np.exp((x - x.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: params.top_k] if params.top_k else order
    p[np.setdiff1d(order, kept)] = 0
    p /= p.sum()
    if params.top_p < 1:
        p[kept[int(np.searchsorted(np.cumsum(p[kept]), params.top_p)) + 1 :]] = 0
    p[p < params.min_p * p.max()] = 0
    found: NDArray[np.float64] = p / p.sum()
    return found


def frequencies(chooser: Sampler, logits: Logits, points: int = 2000) -> NDArray[np.float64]:
    """How often each token is chosen by evenly spaced random numbers: exact to 1 / points."""
    found = np.zeros(len(logits))
    for i in range(points):
        found[chooser._sample(logits, (i + 0.5) / points)] += 1 / points
    return found


# -- random numbers -----------------------------------------------------------------------------------


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_random_numbers_lie_in_range_and_depend_on_seed_and_draw_only(seed: int, draw: int) -> None:
    assert 0.0 <= uniform(seed, draw) < 1.0
    assert uniform(seed, draw) == uniform(seed, draw)
    assert uniform(seed, draw) != uniform(seed, draw + 1)
    assert uniform(seed, draw) != uniform(seed + 1, draw)


@pytest.mark.parametrize(
    "numbers", [[uniform(7, i) for i in range(20_000)], [uniform(i, 7) for i in range(20_000)]]
)
def test_random_numbers_are_spread_evenly_over_draws_and_over_seeds(numbers: list[float]) -> None:
    cells = np.bincount((np.array(numbers) * 20).astype(int), minlength=20)
    assert abs(cells - 1000).max() < 5 * math.sqrt(950)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / math.sqrt(20_000)


# -- parts --------------------------------------------------------------------------------------------


@QUICK
@given(SIZES, st.integers(0, 10**6), st.integers(1, 300), st.booleans())
def test_top_ids_are_those_of_a_stable_sort(size: int, seed: int, count: int, coarse: bool) -> None:
    values = random_logits(size, seed, coarse=coarse)
    assert top_ids(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@QUICK
@given(
    SIZES,
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 0.999]),
    st.sampled_from([0.1, 3.0]),
)
def test_a_nucleus_is_the_fewest_largest_that_hold_the_share(
    size: int, seed: int, share: float, spread: float
) -> None:
    logits = random_logits(size, seed, spread)
    weights = np.exp(logits - logits.max())
    found = nucleus(weights, share)
    assert found.tolist() == top_ids(weights, len(found)).tolist()
    held, whole = np.cumsum(weights[found], dtype=np.float64), float(weights.sum(dtype=np.float64))
    assert held[-1] >= share * whole * (1 - 1e-5)
    assert len(found) == 1 or held[-2] < share * whole * (1 + 1e-5)


@QUICK
@given(SIZES, st.integers(0, 10**6))
def test_picking_follows_the_weights(size: int, seed: int) -> None:
    weights = np.exp(random_logits(size, seed, 6.0))
    weights[np.random.default_rng(seed).random(size) < 0.3] = 0
    weights[size // 2] = weights.max() + 1  # at least one is positive
    chosen = np.zeros(size)
    for i in range(500):
        chosen[pick(weights, (i + 0.5) / 500)] += 1 / 500
    assert not chosen[weights == 0].any()
    assert abs(chosen - weights / weights.sum(dtype=np.float64)).max() <= 1 / 500 + 1e-4


@pytest.mark.parametrize("size", [1, 100, 5000, 5003])
def test_the_last_random_number_still_picks_something_possible(size: int) -> None:
    weights = np.zeros(size, np.float32)
    weights[: size // 2 + 1] = 0.1
    for point in (0.0, 1 - 2**-53, 1.0):
        assert weights[pick(weights, point)] > 0


@QUICK
@given(SIZES, st.integers(0, 10**6))
def test_sums_and_normalizers_are_right(size: int, seed: int) -> None:
    logits = random_logits(size, seed)
    precise = np.exp(logits.astype(np.float64))
    assert total(np.exp(logits)) == pytest.approx(precise.sum(), rel=1e-4)
    assert log_total(logits, np.empty_like(logits)) == pytest.approx(math.log(precise.sum()), abs=1e-4)


# -- whole distributions ------------------------------------------------------------------------------


PENALTIES = [(0.0, 0.0, 1.0), (1.5, 0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.0, 1.4), (-1.0, 0.5, 0.8)]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    presence, frequency, repetition = draw(st.sampled_from(PENALTIES))
    return SamplingParams(
        max_tokens=9,
        temperature=draw(st.sampled_from([0.3, 0.7, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, 300])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5])),
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=draw(st.sampled_from([(), ((0, 4.0), (3, -100.0))])),
    )


@QUICK
@given(SMALL, st.integers(0, 10**6), sampling_params())
def test_tokens_follow_the_distribution_that_the_parameters_mean(
    size: int, seed: int, params: SamplingParams
) -> None:
    logits, prompt, answer = random_logits(size, seed), [0, 1, 1], [1, 2, 2, 4]
    chooser = Sampler(params, len(prompt), np.zeros(size, np.float32))
    adjusted = chooser._adjusted(logits, prompt + answer, 7).copy()
    expected = distribution(logits, params, prompt, answer)
    found = frequencies(chooser, adjusted, 400)
    assert abs(found - expected).max() <= 1 / 400 + 1e-3
    assert found[expected == 0].sum() <= 1e-2  # a token on the edge of a cut may fall on either side


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    rows = np.array([[0, 5, 5, 1], [-3, -2, -9, -2]], np.float32)
    assert greedy(rows) == [1, 1]
    assert [sampler(4, temperature=0.0).choose(row, [], 0, 0) for row in rows] == [1, 1]


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 0.01])
def test_a_low_temperature_is_as_good_as_none(temperature: float) -> None:
    logits = random_logits(1000, 5)
    chosen = {
        sampler(1000, temperature=temperature, seed=seed).choose(logits, [], 0, 0) for seed in range(50)
    }
    assert chosen == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_or_forbids_a_token(temperature: float) -> None:
    logits = random_logits(500, 1)
    best = int(logits.argmax())
    forced = sampler(500, temperature=temperature, logit_bias=((7, 100.0),))
    assert {forced.choose(logits, [], 0, draw) for draw in range(30)} == {7}
    banned = sampler(500, temperature=temperature, logit_bias=((best, -100.0),))
    assert best not in {banned.choose(logits, [], 0, draw) for draw in range(200)}


def test_a_bias_for_a_token_that_the_model_lacks_does_nothing() -> None:
    logits = random_logits(50, 1)
    chooser = sampler(50, temperature=0.0, logit_bias=((50, 100.0), (-1, 100.0)))
    assert chooser.choose(logits, [], 0, 0) == int(logits.argmax())


def test_penalties_see_what_they_promise_to_see() -> None:
    """Token 0 is likely. Presence and frequency look at the answer only, repetition at the prompt too."""
    logits = np.array([3.0, 2.0, 1.0], np.float32)

    def chosen(tokens: list[int], prompt_tokens: int, **changes: object) -> int:
        chooser = sampler(3, prompt_tokens, temperature=0.0, **changes)
        return chooser.choose(logits, tokens, len(tokens), 0)

    assert chosen([0, 0, 0], 3, presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert chosen([0], 1, repetition_penalty=2.0) == 1
    assert chosen([5 % 3, 0], 1, presence_penalty=1.5) == 1
    assert chosen([2, 0], 1, frequency_penalty=0.9) == 0
    assert chosen([2, 0, 0], 1, frequency_penalty=0.9) == 1
    assert chosen([2, 0, 0], 1, presence_penalty=0.9) == 0


def test_penalties_are_the_same_whether_counted_step_by_step_or_at_once() -> None:
    tokens = np.random.default_rng(0).integers(0, 90, 200).tolist()
    changes: dict[str, object] = {
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.2,
    }
    steady, logits = sampler(100, 20, **changes), random_logits(100, 3)
    for end in range(20, 200):
        chosen = steady.choose(logits, tokens, end, end)
        assert chosen == sampler(100, 20, **changes).choose(logits, tokens[:end], end, end)


def test_choosing_does_not_write_to_the_logits() -> None:
    logits = random_logits(5000, 2)
    before = logits.copy()
    logits.flags.writeable = False
    for changes in ({}, {"top_k": 5}, {"top_p": 0.5}, {"repetition_penalty": 2.0}, {"temperature": 0.0}):
        sampler(5000, **changes).choose(logits, [1, 2], 2, 0)
    score(logits, 3, 5, np.zeros(5000, np.float32))
    assert (logits == before).all()


# -- log-probabilities --------------------------------------------------------------------------------


@QUICK
@given(SIZES, st.integers(0, 10**6), st.integers(0, 20))
def test_scores_are_the_logarithms_of_the_softmax(size: int, seed: int, count: int) -> None:
    logits = random_logits(size, seed)
    precise = logits.astype(np.float64) - math.log(np.exp(logits.astype(np.float64)).sum())
    token = seed % size
    found = score(logits, token, count, np.empty_like(logits))
    assert found.logprob == pytest.approx(precise[token], abs=1e-4)
    assert [i for i, _ in found.top] == np.argsort(-logits, kind="stable")[:count].tolist()
    assert [value for _, value in found.top] == pytest.approx([precise[i] for i, _ in found.top], abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [10, 5000])
def test_logits_that_are_no_distribution_are_refused(bad: float, size: int) -> None:
    logits = random_logits(size, 0)
    logits[size // 2] = bad
    scratch = np.zeros(size, np.float32)
    with pytest.raises(BadLogits):
        greedy(logits[None])
    with pytest.raises(BadLogits):
        score(logits, 0, 1, scratch)
    for changes in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}):
        with pytest.raises(BadLogits):
            sampler(size, **changes).choose(logits, [], 0, 0)
    with pytest.raises(BadLogits):
        greedy(np.full((1, 4), -math.inf, np.float32))
