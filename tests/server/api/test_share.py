"""Requests of many texts: a few of them under way at a time, and none begun after the first failure."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.errors import EngineFailed
from server.process.client import EngineClient
from server.types import Generate, Tokens
from tests.server.api.support import COMPLETIONS, completion, error_of, serving

EMBEDDINGS = "/v1/embeddings"
SHARE = 2  # of the four slots of the toy
TEXTS = [f"Day {number} of" for number in range(12)]
embed, generate = EngineClient.embed, EngineClient.generate


class Watch:
    """Stands between the web side and an engine: how many texts were given to it, and how many at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.running = self.most = 0
        self.failing: int | None = None  # the number of the text that fails
        self.stuck = asyncio.Event()  # texts wait for it, and the failing one fails beside them
        self.stuck.set()

        async def watched_embed(engine: EngineClient, tokens: Sequence[int]) -> bytes:
            await self._enter()
            try:
                return await embed(engine, tokens)
            finally:
                self.running -= 1

        async def watched_generate(engine: EngineClient, request: Generate) -> AsyncGenerator[Tokens]:
            await self._enter()
            try:
                async for event in generate(engine, request):
                    yield event
            finally:
                self.running -= 1

        monkeypatch.setattr(EngineClient, "embed", watched_embed)
        monkeypatch.setattr(EngineClient, "generate", watched_generate)

    async def _enter(self) -> None:
        number, self.begun = self.begun, self.begun + 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            if number == self.failing:
                raise EngineFailed("this text fails")
            await self.stuck.wait()
        except BaseException:
            self.running -= 1
            raise


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def body(path: str) -> dict[str, Any]:
    return {"model": "toy", "input": TEXTS} if path == EMBEDDINGS else completion(prompt=TEXTS)


both = pytest.mark.parametrize("path", [EMBEDDINGS, COMPLETIONS])


@both
async def test_a_few_texts_of_a_request_are_under_way_at_a_time(
    tmp_path: Path, watch: Watch, path: str
) -> None:
    async with serving(tmp_path) as http:
        answer = await http.post(path, json=body(path))
        assert (watch.begun, watch.most) == (len(TEXTS), SHARE)
    listed = answer.json()["data" if path == EMBEDDINGS else "choices"]
    assert [item["index"] for item in listed] == list(range(len(TEXTS)))


async def test_vectors_stand_in_the_order_of_their_texts(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        listed = (await http.post(EMBEDDINGS, json=body(EMBEDDINGS))).json()["data"]
        alone = [
            (await http.post(EMBEDDINGS, json={"model": "toy", "input": text})).json()["data"][0]
            for text in TEXTS
        ]
    assert [item["embedding"] for item in listed] == [item["embedding"] for item in alone]


@both
async def test_nothing_is_begun_after_a_text_that_failed(tmp_path: Path, watch: Watch, path: str) -> None:
    watch.failing = 1
    async with serving(tmp_path) as http:
        watch.stuck.clear()
        answer = await http.post(path, json=body(path))
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "engine_failed"
        assert (watch.begun, watch.running) == (SHARE, 0)


@both
async def test_nothing_is_begun_for_a_client_that_left(tmp_path: Path, watch: Watch, path: str) -> None:
    async with serving(tmp_path) as http:
        watch.stuck.clear()
        asking = asyncio.create_task(http.post(path, json=body(path)))
        while watch.begun < SHARE:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
        watch.stuck.set()
        await asyncio.sleep(0.05)
        assert (watch.begun, watch.running) == (SHARE, 0)


@both
async def test_two_such_requests_leave_room_in_the_queue(
    tmp_path: Path, watch: Watch, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 texts three are with the engine, which has four slots: one is free for others."""
    monkeypatch.setattr(EngineClient, "requests", property(lambda _: watch.running))
    async with serving(tmp_path, queue_limit=1) as http:
        watch.stuck.clear()
        large = [asyncio.create_task(http.post(path, json=body(path))) for _ in range(2)]
        while watch.running < SHARE + 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert watch.running == SHARE + 1  # the later one has one text under way
        small = asyncio.create_task(http.post(COMPLETIONS, json=completion()))
        await asyncio.sleep(0.05)
        watch.stuck.set()
        assert [answer.status_code for answer in await asyncio.gather(small, *large)] == [200] * 3


async def test_many_texts_for_a_full_queue_are_refused_before_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as http:
        assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
        monkeypatch.setattr(EngineClient, "requests", 1000)
        for refused in (
            await http.post(COMPLETIONS, json=completion(prompt=TEXTS, stream=True)),
            await http.post(EMBEDDINGS, json=body(EMBEDDINGS)),
        ):
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "overloaded"


@both
async def test_beside_a_busy_engine_the_texts_go_one_by_one_and_all_go(
    tmp_path: Path, watch: Watch, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineClient, "requests", property(lambda _: watch.running + SHARE))
    async with serving(tmp_path) as http:
        answer = await http.post(path, json=body(path))
    assert answer.status_code == 200
    assert (watch.begun, watch.most) == (len(TEXTS), 1)
