"""One key's share: requests at once and requests a minute."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.limits import CALLERS, CallerLimits
from server.errors import RateLimited
from tests.server.api.support import CHAT, COMPLETIONS, application, chat, client, completion, error_of
from tests.server.pool.support import toy, write_gguf


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def start(limits: CallerLimits, caller: str = "a") -> bool:
    try:
        with limits.request(caller):
            return True
    except RateLimited:
        return False


def test_requests_at_once() -> None:
    limits = CallerLimits(2, None)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(limits.request("a"))
        assert not start(limits)
        assert start(limits, "b")
    assert start(limits)


@given(per_minute=st.integers(1, 200), gaps=st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_no_window_of_a_minute_starts_more_than_twice_the_rate(per_minute: int, gaps: list[float]) -> None:
    clock = Clock()
    limits = CallerLimits(None, per_minute, clock)
    started = []
    for gap in gaps:
        clock.now += gap
        if start(limits):
            started.append(clock.now)
    for first in started:  # what was saved up in a quiet minute, and what came back since
        assert sum(first <= at <= first + 60 for at in started) <= 2 * per_minute


def test_waiting_as_long_as_one_is_told_helps() -> None:
    clock = Clock()
    limits = CallerLimits(None, 7, clock)
    assert sum(start(limits) for _ in range(20)) == 7
    for _ in range(20):
        with pytest.raises(RateLimited) as caught, limits.request("a"):
            pass
        assert caught.value.retry_after
        clock.now += caught.value.retry_after
        assert start(limits)


def test_only_so_many_callers_are_remembered_and_running_ones_always() -> None:
    limits = CallerLimits(1, None)
    with limits.request("held"):
        for number in range(CALLERS + 10):
            start(limits, str(number))
        assert len(limits._uses) <= CALLERS
        assert not start(limits, "held")


async def test_over_http_a_key_that_is_busy_gets_429_and_another_is_served(tmp_path: Path) -> None:
    long = toy(write_gguf(tmp_path / "toy.gguf", context=60_000), context=60_000)
    endless = completion(prompt=[5], max_tokens=50_000, timeout=1.5)
    keys = {"api_keys": ("one", "two"), "key_concurrency": 1}
    async with application(tmp_path, long, **keys) as app, client(app) as http:
        one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
        assert (await http.post(CHAT, json=chat(), headers=one)).status_code == 200  # loaded
        busy = asyncio.create_task(http.post(COMPLETIONS, json=endless, headers=one))
        await asyncio.sleep(0.2)
        refused = await http.post(CHAT, json=chat(), headers=one)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert (await http.get("/v1/models", headers=one)).status_code == 200
        assert (await http.post(CHAT, json=chat(), headers=two)).status_code == 200
        assert (await busy).status_code == 408
        assert (await http.post(CHAT, json=chat(), headers=one)).status_code == 200


async def test_keys_that_nobody_checks_do_not_multiply_a_share(tmp_path: Path) -> None:
    async with application(tmp_path, key_rate=2) as app:
        statuses = []
        for number in range(4):
            async with client(app, authorization=f"Bearer made-up-{number}") as http:
                statuses.append((await http.post(CHAT, json=chat())).status_code)
        assert statuses == [200, 200, 429, 429]
        async with client(app, "10.0.0.8") as http:
            assert (await http.post(CHAT, json=chat())).status_code == 200
