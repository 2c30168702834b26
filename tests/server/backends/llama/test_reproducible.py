"""Requests with a seed, through scheduler and prefix cache: the same text alone and in any company."""

import random
from dataclasses import dataclass

from msgspec.structs import replace as changed

from server.backends.llama.backend import LlamaOpened
from server.backends.llama.executor import LlamaExecutor
from server.engine.loop import EngineLoop
from server.types import Command, Events, Generate, Limits, Reply, SamplingParams, TokenLogprobs, Tokens
from tests.server.backends.llama.support import TEXTS, Line, clear, follow, generate, params, step
from tests.server.engine.script import Script

ANSWER = 24  # tokens
STEM = "Here is a short story that every child in the village knows by heart, and it begins like this: "


@dataclass(frozen=True)
class Text:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()

    def __add__(self, event: Tokens) -> "Text":
        return Text(self.tokens + event.tokens, self.logprobs + (event.logprobs or ()))


class Unclosed:
    """The session's executor, which a loop must not close when it ends."""

    def __init__(self, executor: LlamaExecutor, limits: Limits) -> None:
        self.executor, self.limits, self.depth = executor, limits, executor.depth
        self.submit, self.collect, self.forget = executor.submit, executor.collect, executor.forget

    def close(self) -> None:
        pass


def answers(opened: LlamaOpened, timed: dict[int, list[Command]], **limits: bool) -> dict[str, Text]:
    """All answers to commands that arrive at given steps. The prefix cache is empty at first and at last."""
    assert isinstance(opened.executor, LlamaExecutor)
    found: dict[str, Text] = {}

    def send(reply: Reply) -> None:
        for event in reply.items if isinstance(reply, Events) else ():
            assert isinstance(event, Tokens)
            found[event.id] = found.get(event.id, Text()) + event

    executor = Unclosed(opened.executor, changed(opened.executor.limits, **limits))
    loop = EngineLoop(executor, Script(timed), send)
    loop.run()
    for slot in list(loop.scheduler.slots.cached):
        loop.scheduler.slots._evict(slot)
    opened.executor.submit(loop.scheduler.plan())
    return found


def requests(opened: LlamaOpened, *, reproducible: bool = True) -> list[Generate]:
    """Some share a long start, so that prefixes are found and, when computed otherwise, not used."""
    texts = [STEM * (number % 2) + text for number, text in enumerate(TEXTS)]
    return [
        Generate(
            id=f"{'seeded' if reproducible else 'plain'}-{number}",
            prompt=tuple(opened.tokenize(text, add_special=True, parse_special=False)),
            params=SamplingParams(
                max_tokens=ANSWER, temperature=1.0, seed=number, logprobs=0, reproducible=reproducible
            ),
        )
        for number, text in enumerate(texts)
    ]


def crowded(seeded: list[Generate], company: list[Generate], rng: random.Random) -> dict[int, list[Command]]:
    timed: dict[int, list[Command]] = {}
    for request in rng.sample([*seeded, *company], len(seeded) + len(company)):
        timed.setdefault(rng.randrange(12), []).append(request)
    return timed


def test_company_with_and_without_seeds_changes_no_bit(q4: LlamaOpened) -> None:
    seeded, company = requests(q4), requests(q4, reproducible=False)
    alone = [answers(q4, {0: [request]})[request.id] for request in seeded]
    for run in range(2):
        together = answers(q4, crowded(seeded, company, random.Random(run)))
        assert [together[request.id] for request in seeded] == alone


def test_a_deterministic_engine_treats_every_request_so(q4: LlamaOpened) -> None:
    plain = requests(q4, reproducible=False)[:8]
    alone = [answers(q4, {0: [request]}, deterministic=True)[request.id] for request in plain]
    together = answers(q4, crowded(plain, [], random.Random(0)), deterministic=True)
    assert [together[request.id] for request in plain] == alone


def test_a_prefix_changes_no_bit_and_neither_does_an_answer_that_became_a_prompt(q4: LlamaOpened) -> None:
    """The second turn of a conversation holds the first, whose answer was computed token by token."""
    first = requests(q4)[1]
    answer = answers(q4, {0: [first]})[first.id].tokens
    second = changed(first, id="second", prompt=first.prompt + answer + first.prompt)
    (alone,) = answers(q4, {0: [second]}).values()
    after = answers(q4, {0: [first], ANSWER + 20: [second]})
    assert after["second"] == alone


def test_a_long_prompt_is_cut_at_page_borders_however_little_a_step_has_left(q4: LlamaOpened) -> None:
    base = requests(q4)[0]
    short = changed(base.params, max_tokens=8)
    # two prompts of which the first leaves a few tokens of the step's 256 to the second
    first = changed(base, id="first", params=short, prompt=(base.prompt * 20)[:247])
    second = changed(base, id="second", params=short, prompt=(base.prompt[::-1] * 20)[:200])
    alone = [answers(q4, {0: [request]})[request.id] for request in (first, second)]
    together = answers(q4, {0: [first, second]})
    assert [together["first"], together["second"]] == alone


def test_an_answer_that_is_computed_again_keeps_its_bits(q4: LlamaOpened) -> None:
    """After a failed step, or when memory was short, a sequence starts again with the answer it has."""
    executor = q4.executor
    prompt = q4.tokenize(STEM, add_special=True, parse_special=False)
    wanted = params(temperature=1.0, seed=1, reproducible=True)
    line = Line(list(prompt), wanted)
    generate(executor, [line], 20, [0])
    (kept,) = follow(executor, [Line(list(prompt), wanted)], [line.tokens[len(prompt) :]])
    (again,) = step(executor, [Line(line.tokens, wanted, prompt_tokens=len(prompt)).row(5, 0)])
    clear(executor)
    assert again.logprobs == kept[-1]
