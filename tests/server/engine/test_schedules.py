"""Whatever the schedule, batched text equals one-at-a-time text and nothing leaks."""

import random
from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.backends.toy import VOCAB, Pages, Rows
from server.types import Abort, Command, Failed, Generate, Hold, Limits, SamplingParams, Tokens
from tests.server.engine.script import Run, alone, run

CONTEXT = 48


@dataclass(frozen=True)
class Schedule:
    timed: dict[int, list[Command]]
    limits: Limits
    requests: dict[str, Generate]
    aborted: frozenset[str]
    fail_at: frozenset[int]


@st.composite
def all_limits(draw: st.DrawFn) -> Limits:
    running = draw(st.integers(1, 5))
    return Limits(
        running=running,
        slots=running + draw(st.integers(0, 3)),
        context=CONTEXT,
        kv_tokens=CONTEXT + draw(st.one_of(st.integers(0, 20), st.integers(0, CONTEXT * 2))),
        step_tokens=running + draw(st.integers(1, 20)),
        page=draw(st.sampled_from([1, 4, 16])),
    )


@st.composite
def all_requests(draw: st.DrawFn, name: str, stems: list[list[int]]) -> Generate:
    """Prompts share stems, so that prefixes are found, copied, trimmed and evicted."""
    stem = draw(st.sampled_from(stems))
    tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8))
    params = SamplingParams(
        max_tokens=draw(st.one_of(st.integers(0, 8), st.integers(0, 40))),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        reproducible=draw(st.booleans()),
        stop_ids=tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=4))),
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )
    return Generate(
        id=name,
        prompt=tuple(stem + tail),
        params=params,
        salt=draw(st.sampled_from(["", "key"])),
        priority=draw(st.integers(0, 1)),
        place=draw(st.integers(0, 3)),
    )


@st.composite
def schedules(draw: st.DrawFn, *, failing: bool = False) -> Schedule:
    stems = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=38), min_size=1, max_size=3))
    timed: dict[int, list[Command]] = defaultdict(list)
    requests, aborted = {}, set()
    for number in range(draw(st.integers(1, 10))):
        name = f"r{number}"
        requests[name] = draw(all_requests(name, stems))
        at = draw(st.one_of(st.integers(0, 3), st.integers(0, 30)))
        timed[at].append(requests[name])
        if draw(st.integers(0, 3)) == 0:
            aborted.add(name)
            timed[at + draw(st.integers(0, 15))].append(Abort(id=name))
        if draw(st.booleans()):
            hold(timed, name, at + draw(st.integers(0, 15)), draw(st.integers(1, 30)))
    fail_at = draw(st.frozensets(st.integers(1, 40), max_size=4)) if failing else frozenset()
    return Schedule(timed, draw(all_limits()), requests, frozenset(aborted), fail_at)


def hold(timed: dict[int, list[Command]], name: str, at: int, steps: int) -> None:
    """A reader that does not read for so many steps."""
    timed[at].append(Hold(id=name, on=True))
    timed[at + steps].append(Hold(id=name, on=False))


def crowded(seed: int) -> Schedule:
    """Many long requests at once in little memory: every step preempts, evicts, trims or shares."""
    rng = random.Random(seed)
    stems = [rng.choices(range(VOCAB), k=rng.randint(0, 30)) for _ in range(2)]
    timed: dict[int, list[Command]] = defaultdict(list)
    requests, aborted = {}, set()
    for number in range(rng.randint(4, 12)):
        name = f"r{number}"
        prompt = rng.choice(stems) + rng.choices(range(VOCAB), k=rng.randint(1, 12))
        params = SamplingParams(
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randint(0, 3),
            reproducible=rng.random() < 0.3,
            stop_ids=tuple(rng.sample(range(VOCAB), k=2)),
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )
        salt = rng.choice(["", "", "key"])
        requests[name] = Generate(
            id=name, prompt=tuple(prompt), params=params, salt=salt, priority=rng.randint(0, 1)
        )
        at = rng.randint(0, 12)
        timed[at].append(requests[name])
        if rng.random() < 0.15:
            aborted.add(name)
            timed[at + rng.randint(0, 25)].append(Abort(id=name))
        if rng.random() < 0.4:
            hold(timed, name, at + rng.randint(0, 25), rng.randint(1, 30))
    running = rng.randint(2, 5)
    limits = Limits(
        running=running,
        slots=running + rng.randint(0, 3),
        context=CONTEXT,
        kv_tokens=CONTEXT + rng.randint(0, 40),
        step_tokens=running + rng.randint(1, 20),
        page=rng.choice([1, 4, 16]),
    )
    return Schedule(timed, limits, requests, frozenset(aborted), frozenset())


def assert_nothing_is_left(result: Run) -> None:
    """Slots and pages are all free or held by cached prefixes; the executor agrees with the ledger."""
    scheduler, memory = result.loop.scheduler, result.executor.memory
    slots = scheduler.slots
    assert not scheduler.running
    assert not scheduler.waiting
    assert not result.executor.last
    assert sorted([*slots.cached, *slots.free]) == list(range(scheduler.limits.slots))
    assert slots.ledger.reclaimable(slots.cached) == slots.ledger.total - slots.ledger.free
    match memory:
        case Pages() | Rows():  # close() gave everything back
            assert not (memory.table if isinstance(memory, Pages) else memory.slots)
    if isinstance(memory, Pages):
        assert len(memory.free) == slots.ledger.total


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
@settings(max_examples=200, deadline=None)
@given(schedule=schedules())
def test_batching_never_changes_the_text(backend: str, schedule: Schedule) -> None:
    check(backend, schedule)


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nor_does_a_crowd(backend: str, seed: int) -> None:
    check(backend, crowded(seed))


def check(backend: str, schedule: Schedule) -> None:
    result = run(backend, schedule.timed, schedule.limits)
    for name, request in schedule.requests.items():
        expected = alone(request, CONTEXT)
        last = result.final(name)
        assert isinstance(last, Tokens)
        text = result.text(name)
        if last.finish == "abort":
            assert name in schedule.aborted
            assert text == expected[: len(text)]
            continue
        assert text == expected
        stopped = bool(text) and text[-1] in request.params.stop_ids
        assert last.finish == ("stop" if stopped else "length")
    assert_nothing_is_left(result)


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
@settings(max_examples=200, deadline=None)
@given(schedule=schedules(failing=True))
def test_a_failed_step_costs_one_request_at_most(backend: str, schedule: Schedule) -> None:
    result = run(backend, schedule.timed, schedule.limits, schedule.fail_at)
    failed = 0
    for name, request in schedule.requests.items():
        expected = alone(request, CONTEXT)
        match result.final(name):
            case Failed(code=code):
                failed += 1
                assert code == "engine_failed"
                assert result.text(name) == expected[: len(result.text(name))]
            case Tokens(finish="abort"):
                assert name in schedule.aborted
            case _:
                assert result.text(name) == expected
    assert failed <= len(schedule.fail_at)
    assert_nothing_is_left(result)
