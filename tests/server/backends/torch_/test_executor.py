"""However prompts are cut and sequences meet, the numbers are those of transformers' own forward."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from server.backends.torch_.executor import TorchExecutor
from server.backends.torch_.fused import FusedLayer
from server.backends.torch_.inputs import Inputs
from server.backends.torch_.opening import replays
from server.engine.step import PREVIOUS, Batch, CopyPrefix, Release, Trim
from server.types import Candidates, Generate, SamplingParams
from tests.server.backends.llama.support import Line, clear, params, step
from tests.server.backends.torch_.conftest import FAMILIES, VOCAB, save_random
from tests.server.backends.torch_.support import Reference, open_model, serve

Folder = Callable[[str], Path]
Oracle = Callable[[str], Reference]

NEAR = 2e-4


def crowd(vocab: int, count: int, seed: int) -> list[Generate]:
    """Requests of many lengths, some of which begin alike; some are scored, some sample with penalties."""
    dice = random.Random(seed)
    stem = [dice.randrange(3, vocab) for _ in range(70)]
    requests = []
    for number in range(count):
        own = [dice.randrange(3, vocab) for _ in range(dice.randrange(1, 60))]
        prompt = stem[: dice.choice((0, 0, 33, 48, 70))] + own
        wanted = SamplingParams(
            max_tokens=dice.randrange(2, 24),
            temperature=dice.choice((0.0, 0.0, 0.9)),
            seed=number,
            reproducible=False,
            frequency_penalty=dice.choice((0.0, 0.0, 0.5)),
            logprobs=5,
            prompt_logprobs=dice.choice((None, None, None, 3)),
            prompt_candidates=candidates(random.Random(number), vocab, len(prompt)),
        )
        requests.append(Generate(id=str(number), prompt=tuple(prompt), params=wanted))
    return requests


def candidates(dice: random.Random, vocab: int, size: int) -> Candidates | None:
    """Ids for the last positions of a prompt."""
    if size < 3:
        return None
    first = dice.randrange(1, size)
    ids = [dice.sample(range(vocab), 4) for _ in range(size - first)]
    return Candidates(first, 4, np.array(ids, "<i4").tobytes())


def worst(reference: Reference, executor: TorchExecutor, requests: list[Generate]) -> tuple[float, int, int]:
    """(largest difference, preemptions, tokens found in the prefix cache)."""
    answers, scheduler = serve(executor, requests)
    assert not [answer.error for answer in answers.values() if answer.error]
    assert all(len(answers[r.id].tokens) == r.params.max_tokens for r in requests)
    found = max(reference.furthest(request, answers[request.id]) for request in requests)
    return found, scheduler.status.preemptions, scheduler.status.cached_tokens


@pytest.mark.parametrize("family", [*FAMILIES, "tiny-chat"])
def test_whatever_runs_together_the_numbers_are_transformers_own(
    family: str, family_folder: Folder, reference: Oracle
) -> None:
    """Prompts cut by a small step, more sequences than memory, prefixes shared, two steps in flight."""
    options = {"step_tokens": "29", "depth": "2"}
    executor = open_model(family_folder(family), context=160, kv_tokens=352, options=options)
    difference, preemptions, cached = worst(reference(family), executor, crowd(VOCAB, 18, seed=5))
    assert difference < NEAR
    assert preemptions > 0
    assert cached > 0
    executor.close()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_transformers_own_layers_compute_what_fused_ones_do(
    family: str, family_folder: Folder, reference: Oracle
) -> None:
    fused = open_model(family_folder(family))
    assert all(isinstance(layer, FusedLayer) for layer in fused._model.model.layers)
    executor = open_model(family_folder(family), options={"fused": "false"})
    difference, _, _ = worst(reference(family), executor, crowd(VOCAB, 6, seed=4))
    assert difference < NEAR


@pytest.mark.parametrize("original", [32, 256])
def test_longrope_is_settled_by_the_context(original: int, tmp_path: Path) -> None:
    """A context beyond that of pretraining turns all its sequences as transformers turns long ones."""
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5] * 2, "long_factor": [1.0, 3.0, 9.0] * 2}
    folder = save_random(
        tmp_path,
        "phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=original,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75, **rope},
    )
    executor, oracle = open_model(folder, context=160), Reference.of(folder)
    wanted = SamplingParams(max_tokens=6, temperature=0.0, logprobs=5, prompt_logprobs=3)
    requests = [Generate(id=str(n), prompt=tuple(range(3 + n, 50 + n)), params=wanted) for n in range(3)]
    difference, _, _ = worst(oracle, executor, requests)
    assert difference < NEAR
    executor.close()


class Again:
    """What a CUDA graph does, without one: the same computation over the same memory."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_recorded_decode_steps_are_as_good_as_computed_ones(
    family: str, family_folder: Folder, reference: Oracle
) -> None:
    """With rows filled up to the next size, and steps of more rows than any recording has."""
    executor = open_model(family_folder(family), parallel=7, context=160, kv_tokens=480)
    recorded = replays(executor._model, executor._cache, executor.limits, Again, lambda _: None)
    runs: list[tuple[int, bool]] = []

    def run(inputs: Inputs) -> torch.Tensor | None:
        found = recorded.run(inputs)
        runs.append((len(inputs.tokens), found is not None))
        return found

    executor.replay = Recorded(run)
    difference, preemptions, _ = worst(reference(family), executor, crowd(VOCAB, 14, seed=6))
    assert difference < NEAR
    assert preemptions > 0
    assert {rows for rows, replayed in runs if replayed} >= {1, 7}  # 7 are filled up to 8
    assert not all(replayed for _, replayed in runs)


@dataclass
class Recorded:
    run: Callable[[Inputs], torch.Tensor | None]


@pytest.mark.parametrize("depth", ["1", "2"])
@pytest.mark.parametrize("step_tokens", ["17", "64", "512"])
def test_the_size_and_number_of_steps_change_nothing(
    step_tokens: str, depth: str, family_folder: Folder, reference: Oracle
) -> None:
    options = {"step_tokens": step_tokens, "depth": depth}
    executor = open_model(family_folder("qwen2"), parallel=4, options=options)
    difference, _, _ = worst(reference("qwen2"), executor, crowd(VOCAB, 12, seed=len(step_tokens)))
    assert difference < NEAR


def test_a_reproducible_engine_gives_the_same_bits_in_company(family_folder: Folder) -> None:
    options = {"deterministic": "true", "step_tokens": "64"}
    executor = open_model(family_folder("llama"), kv_tokens=352, options=options)
    requests = crowd(VOCAB, 10, seed=1)
    together, _ = serve(executor, requests)
    clear(executor)
    for request in requests:
        alone, _ = serve(executor, [request])
        clear(executor)
        assert alone[request.id] == together[request.id]


def test_many_scores_are_computed_in_several_passes(family_folder: Folder, reference: Oracle) -> None:
    executor = open_model(family_folder("qwen3"))
    executor.outputs = 7
    difference, _, _ = worst(reference("qwen3"), executor, crowd(VOCAB, 12, seed=3))
    assert difference < NEAR


# -- slots --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(family_folder: Folder) -> TorchExecutor:
    return open_model(family_folder("mistral"))


def last_scores(executor: TorchExecutor, line: Line, slot: int, start: int) -> dict[int, float]:
    (result,) = step(executor, [line.row(slot, start)])
    assert result.logprobs is not None
    return dict(result.logprobs.top)


def expected(reference: Reference, line: Line) -> dict[int, float]:
    values, ids = reference.logprobs(line.tokens)[-1].sort(descending=True)
    return dict(zip(ids[:20].tolist(), values[:20].tolist(), strict=True))


def line_of(seed: int, size: int) -> Line:
    dice = random.Random(seed)
    return Line([dice.randrange(3, VOCAB) for _ in range(size)], params(logprobs=20))


@pytest.mark.parametrize("count", [16, 32, 33, 5, 47])
def test_a_copied_prefix_of_any_length_is_as_good_as_a_computed_one(
    count: int, small: TorchExecutor, reference: Oracle
) -> None:
    """Also where both go on to write in the page in which the prefix ends."""
    first, rest = line_of(1, 48), line_of(2, 20)
    other = Line(first.tokens[:count] + rest.tokens, params(logprobs=20))
    third = Line(first.tokens[:count] + rest.tokens[::-1], params(logprobs=20))
    step(small, [first.row(0, 0, samples=False, end=-1)])
    step(small, (), [CopyPrefix(0, 1, count), CopyPrefix(1, 2, count), Trim(0, count)])
    for slot, line in ((1, other), (2, third), (0, first)):
        found = last_scores(small, line, slot, count)
        assert found == pytest.approx(expected(reference("mistral"), line), abs=NEAR)
    clear(small)
    assert small._tables.free == -(-small.limits.kv_tokens // 16)


def test_a_slot_that_was_used_before_holds_nothing_of_it(small: TorchExecutor, reference: Oracle) -> None:
    step(small, [line_of(seed, 60).row(seed, 0) for seed in range(4)])
    step(small, (), [Release(2), Trim(1, 16)])
    line = line_of(9, 30)
    again = Line(line_of(1, 60).tokens[:16] + line.tokens, params(logprobs=20))
    assert last_scores(small, line, 2, 0) == pytest.approx(expected(reference("mistral"), line), abs=NEAR)
    assert last_scores(small, again, 1, 16) == pytest.approx(expected(reference("mistral"), again), abs=NEAR)
    clear(small)


def test_a_token_that_only_the_device_knows_is_the_one_sampled_before(small: TorchExecutor) -> None:
    line, known = line_of(3, 20), line_of(3, 20)
    tickets = [small.submit(Batch((), (line.row(0, 0),)))]
    flying = Line([*line.tokens, PREVIOUS], params(logprobs=20)).row(0, 20)
    tickets.append(small.submit(Batch((), (flying,))))
    (first,), (second,) = (small.collect(ticket) for ticket in tickets)
    assert first.token is not None
    clear(small)
    known.tokens.append(first.token)
    assert second.logprobs is not None
    assert dict(second.logprobs.top) == pytest.approx(last_scores(small, known, 1, 0), abs=NEAR)
    clear(small)


# -- failures -----------------------------------------------------------------------------------------


def test_out_of_memory_fails_the_youngest_and_the_rest_goes_on(
    family_folder: Folder, reference: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = open_model(family_folder("qwen2"), options={"depth": "2"})
    calls = 0
    forward = executor._model.forward

    def sometimes(**arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**arguments)

    monkeypatch.setattr(executor._model, "forward", sometimes)
    requests = crowd(VOCAB, 5, seed=8)
    answers, _ = serve(executor, requests)
    assert [r.id for r in requests if answers[r.id].error] == ["4"]
    assert answers["4"].error == "out of memory"
    for request in requests[:4]:
        assert reference("qwen2").furthest(request, answers[request.id]) < NEAR


def test_a_model_that_computes_no_numbers_fails_its_step_and_poisons_nobody(
    family_folder: Folder, reference: Oracle
) -> None:
    executor = open_model(family_folder("qwen2"), parallel=1)
    weight = executor._model.get_input_embeddings().weight
    kept = weight[5].clone()
    weight[5] = float("nan")
    bad = Generate(id="bad", prompt=(3, 4, 5) * 20, params=SamplingParams(max_tokens=4, reproducible=False))
    answers, _ = serve(executor, [bad])
    assert answers["bad"].error == "the model's logits are not finite numbers"
    weight[5] = kept
    (request,) = crowd(VOCAB, 1, seed=2)
    answers, _ = serve(executor, [request])
    assert reference("qwen2").furthest(request, answers["0"]) < NEAR
    assert not any(keys.isnan().any() for keys in executor._cache.keys)


def test_a_small_pass_takes_one_thread_and_a_large_one_all(family_folder: Folder) -> None:
    executor = open_model(family_folder("tiny-chat"), threads=2)
    used: list[tuple[int, int]] = []
    executor._model.base_model.register_forward_hook(
        lambda _module, _, given, __: used.append((given["input_ids"].shape[1], torch.get_num_threads())),
        with_kwargs=True,
    )
    wanted = SamplingParams(max_tokens=3, temperature=0.0, reproducible=False)
    serve(executor, [Generate(id="a", prompt=tuple(range(5, 95)), params=wanted)])
    executor.close()
    torch.set_num_threads(1)
    assert used == [(90, 2), (1, 1), (1, 1)]
