"""R20: callers of different keys learn nothing of each other, by time or by text."""

import asyncio
import random
import statistics
import time
from pathlib import Path

import httpx
import pytest

from server.types import Generate, SamplingParams
from tests.faults.servers import COMPLETIONS, Server, amount, serving, told, toy_models
from tests.server.engine.script import alone

AT_ONCE = 64
PROMPT = 5000  # tokens, which keep the toy busy far longer than reading the request takes
END = 96


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def prompt_of(rng: random.Random) -> list[int]:
    return [rng.randrange(1, 90) for _ in range(PROMPT)]


def first_token_s(server: Server, prompt: list[int], who: str) -> tuple[float, int]:
    """Of an answer of one token; and how many tokens of the prompt were at hand."""
    body = {"model": "toy", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    answer = server.post(COMPLETIONS, body, headers=key(who))
    taken = time.perf_counter() - started
    assert answer.status_code == 200
    return taken, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_time_to_a_first_token_tells_nothing_of_another_key(tmp_path: Path) -> None:
    """What another key has computed is neither used nor faster; one's own is."""
    rng, rounds = random.Random(20), amount(short=6, full=60)
    times: dict[str, list[float]] = {"miss": [], "other": [], "own": []}
    with serving(tmp_path, toy_models(tmp_path, parallel=4)) as server:
        first_token_s(server, prompt_of(rng), "warm")
        for number in range(rounds):
            seen, fresh = prompt_of(rng), prompt_of(rng)
            first_token_s(server, seen, "alice")
            own, cached = first_token_s(server, seen, "alice")
            assert cached > 0.9 * PROMPT
            times["own"].append(own)
            asked = [("other", seen), ("miss", fresh)]
            for what, prompt in asked if number % 2 else reversed(asked):
                taken, cached = first_token_s(server, prompt, "mallory")
                assert cached == 0
                times[what].append(taken)
    miss, other, own = (statistics.median(times[what]) for what in ("miss", "other", "own"))
    ratio = max(miss / other, other / miss)
    told(
        f"R20: first token {1000 * miss:.0f} ms, {1000 * other:.0f} ms after another key (ratio "
        f"{ratio:.3f}), {1000 * own:.0f} ms within a key, medians of {rounds}"
    )
    assert own < miss
    assert ratio <= amount(short=200, full=110) / 100


@pytest.mark.slow
async def test_no_answer_holds_the_text_of_another(tmp_path: Path) -> None:
    """64 at once: each gets, to the last character, what it would get alone."""
    count = amount(short=300, full=10_000)
    with serving(tmp_path, toy_models(tmp_path, parallel=16)) as server:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            places = asyncio.Semaphore(AT_ONCE)
            started = time.monotonic()
            wrong = await asyncio.gather(*(one(http, places, number) for number in range(count)))
    told(f"R20: {count} requests, {AT_ONCE} at once, {sum(wrong)} wrong, {time.monotonic() - started:.0f} s")
    assert sum(wrong) == 0


async def one(http: httpx.AsyncClient, places: asyncio.Semaphore, number: int) -> bool:
    """Whether its text was wrong."""
    rng = random.Random(number)
    prompt = tuple(rng.randrange(1, 90) for _ in range(rng.randrange(1, 60)))
    params = SamplingParams(max_tokens=rng.randrange(1, 24), temperature=0.0, stop_ids=(END,))
    tokens = alone(Generate(id="r", prompt=prompt, params=params), 65_536)
    expected = "".join(chr(32 + token) for token in tokens if token != END)
    body = {"model": "toy", "prompt": prompt, "max_tokens": params.max_tokens, "temperature": 0}
    async with places:
        answer = await http.post(COMPLETIONS, json=body, headers=key(f"key-{number % 7}"))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text != expected
