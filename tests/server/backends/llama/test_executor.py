"""Steps over a real model: batches change nothing, slots are kept apart, failures leave no trace."""

import numpy as np
import pytest
from numpy.typing import NDArray

from server.backends.llama.backend import LlamaOpened
from server.backends.llama.executor import LlamaExecutor
from server.engine.step import CopyPrefix, Executor, Release, Trim
from server.types import Candidates, SamplingParams, TokenLogprobs
from tests.server.backends.llama.support import (
    TEXTS,
    Line,
    clear,
    differences,
    follow,
    generate,
    params,
    step,
)

PARIS = "The capital of France is Paris"


def encoded(opened: LlamaOpened) -> list[list[int]]:
    return [opened.tokenize(text, add_special=True, parse_special=False) for text in TEXTS]


def prompts_and_rest(opened: LlamaOpened) -> tuple[list[list[int]], list[list[int]]]:
    """Eight forced tokens for each text; the prompts before them differ in length."""
    texts = encoded(opened)
    return [tokens[:-8] for tokens in texts], [tokens[-8:] for tokens in texts]


def together_and_alone(opened: LlamaOpened, *, reproducible: bool = False) -> list[float]:
    prompts, rest = prompts_and_rest(opened)
    executor, top = opened.executor, params(logprobs=20, reproducible=reproducible)
    together = follow(executor, [Line(list(prompt), top) for prompt in prompts], rest)
    found: list[float] = []
    for prompt, forced, batched in zip(prompts, rest, together, strict=True):
        (alone,) = follow(executor, [Line(list(prompt), top)], [forced])
        found += differences(batched, alone)
    assert len(found) > 16 * 9 * 15  # nearly all of the 20 are the same tokens
    return found


def test_sixteen_at_once_are_as_one_at_a_time_unless_speed_is_asked_for(q4: LlamaOpened) -> None:
    executor, top = q4.executor, SamplingParams(max_tokens=64, temperature=0.0, logprobs=20)
    prompts, rest = prompts_and_rest(q4)
    together = follow(executor, [Line(list(prompt), top) for prompt in prompts], rest)
    for prompt, forced, batched in zip(prompts, rest, together, strict=True):
        (alone,) = follow(executor, [Line(list(prompt), top)], [forced])
        assert max(differences(batched, alone)) == 0.0


def test_sixteen_at_once_are_as_one_at_a_time_in_f32(either: LlamaOpened) -> None:
    assert max(together_and_alone(either)) < 1e-3


def test_nothing_needs_to_be_said_for_f32_weights_to_be_exact(f32_default: LlamaOpened) -> None:
    assert max(together_and_alone(f32_default)) < 1e-3


def test_sixteen_at_once_are_as_one_at_a_time_in_q4(q4: LlamaOpened, q4_exact: LlamaOpened) -> None:
    """As near as the kernels allow: they round activations to 8 bits, one row and several differently.

    How much that changes shows beside the same weights computed in F32: batching may not add to it.
    """
    prompts = encoded(q4)
    together = log_softmax(logits_of(q4.executor, prompts))
    alone = log_softmax(np.concatenate([logits_of(q4.executor, [prompt]) for prompt in prompts]))
    exact = log_softmax(logits_of(q4_exact.executor, prompts))
    assert np.abs(together - alone).mean() < 1.5 * np.abs(alone - exact).mean()
    assert divergence(alone, together) < max(0.005, 2 * divergence(exact, alone))


@pytest.mark.parametrize("weights", ["q4", "f32_default"])
def test_company_changes_nothing_for_reproducible_sequences(
    weights: str, request: pytest.FixtureRequest
) -> None:
    opened: LlamaOpened = request.getfixturevalue(weights)
    assert max(together_and_alone(opened, reproducible=True)) == 0.0


def logits_of(executor: Executor, prompts: list[list[int]]) -> NDArray[np.float32]:
    assert isinstance(executor, LlamaExecutor)
    step(executor, [Line(list(prompt)).row(slot, 0) for slot, prompt in enumerate(prompts)])
    logits: NDArray[np.float32] = executor._context.logits(len(prompts)).copy()
    clear(executor)
    return logits


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean Kullback-Leibler divergence of the rows, in nats."""
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_prefill_in_chunks_beside_decoding_rows_gives_the_same_scores(f32: LlamaOpened) -> None:
    executor, texts = f32.executor, encoded(f32)
    whole = prefill_scores(executor, texts[0])
    other = Line(texts[1])
    (result,) = step(executor, [other.row(3, 0)])
    scores: list[TokenLogprobs] = []
    line = Line(list(texts[0]), params(prompt_logprobs=5))
    for start in range(0, len(line.tokens), 5):
        assert result.token is not None
        other.tokens.append(result.token)
        rows = [line.row(0, start, samples=False, end=start + 5), other.row(3, len(other.tokens) - 1)]
        chunk, result = step(executor, rows)
        scores += chunk.prompt_logprobs
    clear(executor)
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in whole], abs=1e-3)
    assert max(differences(scores, whole)) < 1e-3


def test_candidates_have_the_log_probabilities_that_the_list_of_the_likely_has(f32: LlamaOpened) -> None:
    """And what is left is left for all others, down to one candidate, however the prompt is cut."""
    executor, tokens = f32.executor, encoded(f32)[0]
    likely = prefill_scores(executor, tokens)[3:]
    for count in (5, 1):
        ids = np.array([[token for token, _ in score.top[:count]] for score in likely], "<i4")
        wanted = Candidates(4, count, ids.tobytes())
        line = Line(list(tokens), params(prompt_logprobs=0, prompt_candidates=wanted))
        scores: list[TokenLogprobs] = []
        for start in range(0, len(tokens), 6):
            (result,) = step(executor, [line.row(0, start, samples=False, end=start + 6)])
            scores += result.prompt_logprobs
        clear(executor)
        assert not any(score.candidates for score in scores[:3])
        logs = np.array([np.frombuffer(score.candidates, "<f4") for score in scores[3:]], np.float64)
        listed = [[log for _, log in score.top[:count]] for score in likely]
        assert logs[:, :-1] == pytest.approx(np.array(listed), abs=1e-3)
        assert np.exp(logs).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def prefill_scores(executor: Executor, tokens: list[int]) -> tuple[TokenLogprobs, ...]:
    line = Line(list(tokens), params(prompt_logprobs=5))
    (result,) = step(executor, [line.row(0, 0)])
    clear(executor)
    assert len(result.prompt_logprobs) == len(tokens) - 1
    return result.prompt_logprobs


def test_many_scores_are_computed_in_several_passes(
    f32: LlamaOpened, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, texts = f32.executor, encoded(f32)
    assert isinstance(executor, LlamaExecutor)
    whole = [prefill_scores(executor, tokens) for tokens in texts[:3]]
    monkeypatch.setattr(executor._context, "outputs", 7)
    lines = [Line(list(tokens), params(prompt_logprobs=5, logprobs=5)) for tokens in texts[:3]]
    plain = Line(list(texts[3]), params(logprobs=5))
    results = step(executor, [lines[0].row(0, 0), plain.row(1, 0), lines[1].row(2, 0), lines[2].row(3, 0)])
    clear(executor)
    for result, scores in zip([results[0], *results[2:]], whole, strict=True):
        assert max(differences(result.prompt_logprobs, scores)) < 1e-3
    monkeypatch.undo()
    for line, result in zip([lines[0], plain], results, strict=False):
        (alone,) = step(executor, [Line(list(line.tokens), params(logprobs=5)).row(0, 0)])
        clear(executor)
        assert (result.token, alone.logprobs is not None) == (alone.token, True)


def test_prompt_scores_are_those_of_the_prompts_tokens(f32: LlamaOpened) -> None:
    """Each score is what the same token gets when it is the next one to be sampled."""
    executor = f32.executor
    tokens = encoded(f32)[0]
    scores = prefill_scores(executor, tokens)
    for end in (1, 4, len(tokens) - 1):
        everything = params(logprobs=20, logit_bias=((tokens[end], 1000.0),))
        (result,) = step(executor, [Line(tokens[:end], everything).row(0, 0)])
        clear(executor)
        assert result.token == tokens[end]  # the bias chose it, its score is the model's
        assert result.logprobs is not None
        assert result.logprobs.logprob == pytest.approx(scores[end - 1].logprob, abs=1e-3)


# -- slots --------------------------------------------------------------------------------------------


def last_logits(executor: Executor, line: Line, slot: int, start: int) -> NDArray[np.float32]:
    assert isinstance(executor, LlamaExecutor)
    step(executor, [line.row(slot, start)])
    logits: NDArray[np.float32] = executor._context.logits(1)[0].copy()
    return logits


def fresh(executor: Executor, tokens: list[int]) -> NDArray[np.float32]:
    clear(executor)
    logits = last_logits(executor, Line(list(tokens)), 7, 0)
    clear(executor)
    return logits


def close(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return float(np.abs(a - b).max()) < 1e-3


def test_a_copied_prefix_is_as_good_as_a_computed_one(either: LlamaOpened) -> None:
    executor = either.executor
    first, second = (texts := encoded(either))[0] * 3, texts[1]
    other = first[:32] + second
    expected, continued = fresh(executor, other), fresh(executor, first)
    step(executor, [Line(first[:-1]).row(0, 0)])
    step(executor, (), [CopyPrefix(0, 1, 32)])
    assert close(last_logits(executor, Line(other), 1, 32), expected)
    assert close(last_logits(executor, Line(first), 0, len(first) - 1), continued)
    clear(executor)


def test_what_happens_to_the_source_of_a_copy_does_not_touch_the_copy(either: LlamaOpened) -> None:
    executor = either.executor
    first, second = (texts := encoded(either))[0] * 3, texts[1]
    other = first[:32] + second
    expected = fresh(executor, other)
    step(executor, [Line(first).row(0, 0)])
    step(executor, (), [CopyPrefix(0, 1, 32), CopyPrefix(0, 2, 32), Trim(0, 16)])
    assert close(last_logits(executor, Line(other), 1, 32), expected)
    step(executor, [Line(texts[2] * 3).row(0, 0)], [Release(0)])  # writes over what slot 0 had to itself
    assert close(last_logits(executor, Line(other), 2, 32), expected)
    clear(executor)


def test_a_trimmed_slot_goes_on_as_if_it_had_never_held_more(either: LlamaOpened) -> None:
    executor = either.executor
    first, second = (texts := encoded(either))[0] * 3, texts[1]
    other = first[:16] + second
    expected = fresh(executor, other)
    step(executor, [Line(first).row(0, 0)])
    step(executor, (), [Trim(0, 16)])
    assert close(last_logits(executor, Line(other), 0, 16), expected)
    clear(executor)


def test_a_released_slot_remembers_nothing(either: LlamaOpened) -> None:
    executor = either.executor
    first, second = encoded(either)[:2]
    expected = fresh(executor, second)
    step(executor, [Line(first).row(slot, 0) for slot in range(4)])
    step(executor, (), [Release(2)])
    assert close(last_logits(executor, Line(second), 2, 0), expected)
    clear(executor)


def test_a_slot_that_was_copied_to_and_fro_holds_what_it_should(either: LlamaOpened) -> None:
    """Copies of copies, with no step between, and sources that are released or used again at once."""
    executor = either.executor
    first, second = (texts := encoded(either))[0] * 3, texts[1]
    other = first[:16] + second
    expected = fresh(executor, other)
    step(executor, [Line(first).row(0, 0), Line(second * 3).row(1, 0)])
    step(
        executor,
        (),
        [CopyPrefix(0, 2, 32), CopyPrefix(2, 3, 16), Release(0), Release(2), CopyPrefix(1, 0, 16)],
    )
    assert close(last_logits(executor, Line(other), 3, 16), expected)
    clear(executor)


def test_a_batch_may_hold_slot_operations_only(either: LlamaOpened) -> None:
    assert step(either.executor, (), [Release(0)]) == []


# -- sampling -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_alone_in_company_and_in_any_order(f32: LlamaOpened) -> None:
    executor = f32.executor
    prompts = encoded(f32)[:5]

    def lines() -> list[Line]:
        return [
            Line(list(prompt), params(temperature=0.8, top_k=k, top_p=0.95, seed=k, logprobs=None))
            for k, prompt in enumerate(prompts)
        ]

    together = generate(executor, lines(), 12, range(5))
    assert len({tuple(text) for text in together}) == 5
    assert generate(executor, lines()[::-1], 12, [9, 2, 14, 3, 0])[::-1] == together
    assert [generate(executor, [line], 12, [5])[0] for line in lines()] == together


def test_other_seeds_give_other_texts(f32: LlamaOpened) -> None:
    prompt = encoded(f32)[0]
    lines = [Line(list(prompt), params(temperature=1.0, seed=seed, logprobs=None)) for seed in range(8)]
    texts = generate(f32.executor, lines, 12, range(8))
    assert len({tuple(text) for text in texts}) > 4


def test_a_preempted_sequence_goes_on_with_the_same_text(f32: LlamaOpened) -> None:
    """It gets another slot and computes everything again, with penalties and a seed."""
    executor, prompt = f32.executor, encoded(f32)[0]
    wanted = params(temperature=0.9, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=None)
    (whole,) = generate(executor, [Line(list(prompt), wanted)], 12, [0])
    line = Line(list(prompt), wanted)
    generate(executor, [line], 5, [0])
    executor.forget(line.key)  # as if another executor had started it
    line_again = Line(line.tokens, wanted, prompt_tokens=len(prompt))
    generate(executor, [line_again], 7, [4])
    assert line_again.tokens[len(prompt) :] == whole


def test_greedy_text_is_the_models_own(f32: LlamaOpened, q4: LlamaOpened) -> None:
    for opened in (f32, q4):
        prompt = opened.tokenize(PARIS[:-6], add_special=True, parse_special=False)
        (text,) = generate(opened.executor, [Line(prompt, params(logprobs=None))], 2, [0])
        assert opened.text is not None
        assert b"".join(opened.text.pieces[token] for token in text).startswith(b" Paris")


def test_forgetting_a_sequence_frees_its_sampling_state(f32: LlamaOpened) -> None:
    executor = f32.executor
    assert isinstance(executor, LlamaExecutor)
    lines = [Line(list(prompt)) for prompt in encoded(f32)]
    generate(executor, lines, 1, range(16))
    for line in lines:
        executor.forget(line.key)
    assert not {line.key for line in lines} & set(executor._samplers)
    executor.forget(lines[0].key)  # twice does no harm
