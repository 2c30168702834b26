"""What one request sees of the engine: refusals, scores, cached prefixes, status."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

import server.engine.loop
from server.backends.toy import Rows, ToyEmbedder, ToyExecutor
from server.engine.loop import EMBED_TOKENS
from server.engine.scheduler import Scheduler
from server.types import (
    Abort,
    Command,
    Embed,
    Embedded,
    Failed,
    Generate,
    Hold,
    Limits,
    SamplingParams,
    Status,
    Tokenize,
    Tokenized,
    Tokens,
)
from tests.server.engine.script import alone, run

BACKENDS = ["toy-rows", "toy-pages"]
LIMITS = Limits(running=2, slots=6, context=64, kv_tokens=384, step_tokens=8, page=4)


def ask(name: str, prompt: tuple[int, ...], count: int = 4, scores: int | None = None) -> Generate:
    return Generate(id=name, prompt=prompt, params=SamplingParams(max_tokens=count, prompt_logprobs=scores))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ask("r", ()), "invalid_value"),
        (ask("r", (1,) * 64), "context_length_exceeded"),
        (ask("r", (1,) * 65, count=0), "context_length_exceeded"),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_: Generate, code: str) -> None:
    result = run("toy-rows", {0: [request_, ask("other", (1, 2))]}, LIMITS)
    (event,) = result.events["r"]
    assert isinstance(event, Failed)
    assert event.code == code
    assert result.text("other") == alone(ask("other", (1, 2)), 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_that_reaches_the_context_ends_with_length(backend: str) -> None:
    result = run(backend, {0: [ask("r", (1,) * 63, count=50)]}, LIMITS)
    last = result.final("r")
    assert isinstance(last, Tokens)
    assert (last.finish, len(result.text("r"))) == ("length", 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_in_use_is_refused_and_the_first_goes_on(backend: str) -> None:
    result = run(backend, {0: [ask("r", (1, 2), 20)], 3: [ask("r", (5,))]}, LIMITS)
    assert [event.code for event in result.events["r"] if isinstance(event, Failed)] == ["invalid_value"]
    assert result.text("r") == alone(ask("r", (1, 2), 20), 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_prompt_position_but_the_first_is_scored_once(backend: str) -> None:
    prompt = tuple(range(30))
    timed: dict[int, list[Command]] = {0: [ask("r", prompt, 0, scores=0), ask("s", prompt, 3)]}
    result = run(backend, timed, LIMITS)
    (event,) = result.events["r"]
    assert isinstance(event, Tokens)
    assert event.tokens == ()
    assert event.finish == "length"
    assert event.prompt_logprobs is not None
    assert [score.logprob for score in event.prompt_logprobs] == [
        -float((sum(prompt[:i]) + prompt[i]) % 97) / 97 for i in range(1, 30)
    ]


def test_a_prompt_is_cut_at_the_same_places_alone_and_in_company() -> None:
    def cuts(others: int) -> set[int]:
        limits = Limits(running=4, slots=4, context=256, kv_tokens=1024, step_tokens=40, page=16)
        scheduler = Scheduler(limits)
        for number in range(others):
            scheduler.add(ask(f"other {number}", (1, 2, 3 + number), 100))
        executor = ToyExecutor(Rows(limits))
        for _ in range(3):
            batch = scheduler.plan()
            scheduler.commit(batch, list(executor.collect(executor.submit(batch))))
        scheduler.add(ask("r", tuple(range(90)), 3))
        found = set()
        for _ in range(8):
            batch = scheduler.plan()
            scheduler.commit(batch, list(executor.collect(executor.submit(batch))))
            found |= {row.start for row in batch.rows if row.sequence.prompt_tokens == 90 and row.start < 90}
        return found

    assert cuts(0) == cuts(3) == {0, 32, 64}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_prefix_is_computed_once_and_only_for_its_own_key(backend: str) -> None:
    prefix = tuple(range(40))
    timed: dict[int, list[Command]] = {
        0: [ask("first", (*prefix, 80))],
        50: [ask("again", (*prefix, 90, 91))],
        80: [Generate(id="other key", prompt=(*prefix, 90), params=SamplingParams(max_tokens=2), salt="b")],
    }
    result = run(backend, timed, LIMITS)
    cached = {}
    for name in ("first", "again", "other key"):
        first = result.events[name][0]
        assert isinstance(first, Tokens)
        cached[name] = first.cached_tokens
    assert cached == {"first": 0, "again": 40, "other key": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_to_the_same_prompt_share_its_computation(backend: str) -> None:
    prompt = tuple(range(41))
    result = run(backend, {0: [ask("a", prompt), ask("b", prompt)]}, LIMITS)
    assert result.statuses[-1].cached_tokens == 40
    assert result.text("a") == result.text("b") == alone(ask("a", prompt), 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_status_says_that_nothing_runs(backend: str) -> None:
    result = run(backend, {0: [ask("r", (1, 2, 3), 9)], 4: [Abort(id="r"), Abort(id="unknown")]}, LIMITS)
    last = result.statuses[-1]
    assert (last.running, last.waiting, last.prompt_tokens) == (0, 0, 3)
    assert last.kv_total_tokens == 384
    assert isinstance(last, Status)


def test_an_engine_without_tokenizer_says_so() -> None:
    result = run(
        "toy-rows", {0: [Tokenize(id="t", text="a", add_special=False, parse_special=False)]}, LIMITS
    )
    (event,) = result.events["t"]
    assert isinstance(event, Failed)
    assert not isinstance(event, Tokenized)


def sequences_of(name: str, count: int) -> list[Command]:
    return [
        Generate(id=f"{name}{n}", prompt=(n + 1,), params=SamplingParams(max_tokens=9), place=n)
        for n in range(count)
    ]


def test_a_request_of_many_sequences_does_not_hold_up_the_next_one() -> None:
    result = run("toy-rows", {0: sequences_of("many", 12), 4: sequences_of("one", 1)}, LIMITS)
    first = [name for n, name in enumerate(result.trace) if name not in result.trace[:n]]
    assert first.index("one0") <= LIMITS.running + 1


def test_nor_is_its_last_sequence_held_up_for_ever() -> None:
    commands = {step: sequences_of(f"s{step}-", 1) for step in range(0, 400, 4)}
    commands[0] = sequences_of("many", 4)
    result = run("toy-rows", commands, LIMITS)
    last = result.trace.index("many3")
    assert sum(name.startswith("s") for name in set(result.trace[last:])) > 50


def test_embeddings_are_made_between_steps_and_taken_back_when_nobody_waits() -> None:
    commands: dict[int, list[Command]] = {
        0: [ask("r", (1, 2), 8), *(Embed(id=f"e{n}", tokens=(n, n + 1)) for n in range(3)), Abort(id="e2")]
    }
    result = run("toy-rows", commands, LIMITS, embedder=ToyEmbedder())
    assert result.text("r") == alone(ask("r", (1, 2), 8), 64)
    for n in range(2):
        assert result.events[f"e{n}"] == [Embedded(id=f"e{n}", vector=ToyEmbedder().embed((n, n + 1)))]
    assert "e2" not in result.events


def test_short_texts_are_embedded_several_at_a_time_and_long_ones_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.engine.loop, "time", Clock(0))
    short = [Embed(id=f"s{n}", tokens=(n,)) for n in range(EMBED_TOKENS * 2)]
    long = [Embed(id=f"l{n}", tokens=(n,) * EMBED_TOKENS) for n in range(2)]
    steps = []
    for texts in (short, long):
        result = run("toy-rows", {0: [ask("r", (1, 2), 40), *texts]}, LIMITS, embedder=ToyEmbedder())
        order = list(result.events)
        assert [name for name in order if name != "r"] == [text.id for text in texts]
        steps.append(result.events_before("r", texts[-1].id))
    assert steps == [2, 2]


class Clock:
    """Stands still between two readings, or goes on by a millisecond each."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


class SlowEmbedder(ToyEmbedder):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def embed(self, tokens: Sequence[int]) -> bytes:
        self.clock.now += 1.0
        return super().embed(tokens)


def test_answers_get_as_much_time_as_texts_to_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short answer waits for one long text, not for one each token; a long answer does not stop texts."""
    clock = Clock(0.001)
    monkeypatch.setattr(server.engine.loop, "time", clock)
    texts = [Embed(id=f"e{n}", tokens=(n,) * EMBED_TOKENS) for n in range(4)]
    embedder = SlowEmbedder(clock)
    result = run("toy-rows", {0: [ask("r", (1, 2), 5), *texts]}, LIMITS, embedder=embedder)
    assert result.events_before("r", "e1") == len(result.events["r"])
    result = run("toy-rows", {0: [ask("r", (1, 2), 50), *texts]}, LIMITS, embedder=SlowEmbedder(Clock(0)))
    assert result.events_before("r", "e3") < 50


def test_an_engine_without_embeddings_refuses_them() -> None:
    result = run("toy-rows", {0: [Embed(id="e", tokens=(1,))]}, LIMITS)
    assert [type(event) for event in result.events["e"]] == [Failed]


def hold(name: str, on: bool) -> Hold:
    return Hold(id=name, on=on)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_reads_stands_still_and_then_goes_on(backend: str) -> None:
    limits = replace(LIMITS, context=128)
    requests = [ask("unread", (1, 2), 40), ask("read", (3, 4), 80)]
    timed: dict[int, list[Command]] = {
        0: [*requests],
        10: [hold("unread", True)],
        10**6: [hold("unread", False)],
    }
    result = run(backend, timed, limits)
    last_read = max(place for place, name in enumerate(result.trace) if name == "read")
    assert result.trace[:last_read].count("unread") < 15
    assert result.trace[last_read:].count("unread") > 20
    assert max(status.held for status in result.statuses) == 1
    assert result.statuses[-1].held == 0
    for request in requests:
        assert result.text(request.id) == alone(request, 128)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_held_sequence_gives_its_slot_to_one_that_waits(backend: str) -> None:
    """Two slots, both of streams that nobody reads: a third is answered, and then they go on."""
    requests = [ask("a", (1, 2), 30), ask("b", (3, 4), 30), ask("new", (5, 6), 4)]
    timed: dict[int, list[Command]] = {
        0: [requests[0], requests[1]],
        10: [hold("a", True), hold("b", True)],
        20: [requests[2]],
        10**6: [hold("a", False), hold("b", False)],
    }
    result = run(backend, timed, LIMITS)
    assert result.events_before("a", "new") < 15
    assert result.statuses[-1].preemptions == 1
    for request in requests:
        assert result.text(request.id) == alone(request, 64)


def crowd(count: int) -> list[Generate]:
    """Long answers that nobody promised to be reproducible."""
    params = SamplingParams(max_tokens=200, reproducible=False)
    return [Generate(id=f"long {n}", prompt=(1, 2 + n), params=params) for n in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(backend: str) -> None:
    """Four slots, twelve long answers; one of them is interrupted, and each has its text in the end."""
    limits = Limits(running=4, slots=4, context=256, kv_tokens=1024, step_tokens=40, page=4)
    long = crowd(12)
    shorts = [ask(f"short {n}", (50 + n, 3), 4) for n in range(5)]
    timed: dict[int, list[Command]] = {0: [*long], **{30 + 20 * n: [one] for n, one in enumerate(shorts)}}
    result = run(backend, timed, limits)
    for n, short in enumerate(shorts):
        assert result.events_before("long 0", short.id) < 40 + 20 * n
    assert result.statuses[-1].preemptions == 1  # the lane stays open for the next ones
    for request in (*long, *shorts):
        assert result.text(request.id) == alone(request, 256)


def test_neither_reproducible_answers_nor_those_that_have_just_begun_are_interrupted() -> None:
    limits = Limits(running=4, slots=4, context=256, kv_tokens=1024, step_tokens=40, page=4)
    long = [ask(f"long {n}", (1, 2 + n), 100) for n in range(4)]
    result = run("toy-rows", {0: [*long], 30: [ask("short", (9, 9))]}, limits)
    assert result.statuses[-1].preemptions == 0
    result = run("toy-rows", {0: [*crowd(4)], 10: [ask("short", (9, 9))]}, limits)
    assert 14 <= result.events_before("long 0", "short") <= 20


@pytest.mark.parametrize(("mine", "theirs", "interrupted"), [(0, 0, 1), (0, 5, 1), (5, 0, 0)])
def test_what_matters_more_is_not_interrupted(mine: int, theirs: int, interrupted: int) -> None:
    limits = Limits(running=4, slots=4, context=256, kv_tokens=1024, step_tokens=40, page=4)
    long = [replace(request, priority=theirs) for request in crowd(4)]
    short = replace(ask("short", (9, 9)), priority=mine)
    result = run("toy-rows", {0: [*long], 30: [short]}, limits)
    assert result.statuses[-1].preemptions == interrupted
    assert result.text("short") == alone(short, 256)
