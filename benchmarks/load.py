"""One level of load: so many streams at once against an OpenAI-compatible server, and what they saw."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    url: str
    model: str
    pid: int = 0  # of the server, where we started it


@dataclass(frozen=True, slots=True)
class Stream:
    """One streamed answer. Times are seconds on one monotonic clock."""

    started: float
    chunks: tuple[float, ...]  # when each chunk with text arrived
    tokens: int  # as the server counted them

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.chunks[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunks)]


@dataclass(frozen=True, slots=True)
class Level:
    """What all streams of one level saw together."""

    streams: int
    requests: int
    failed: int
    tokens_per_s: float
    first_p50_ms: float
    first_p95_ms: float
    gap_p50_ms: float
    gap_p95_ms: float


class BadAnswer(Exception):
    """The server answered, but not with a stream of text and a count of tokens."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values; NaN where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(streams: int, done: Sequence[Stream], failed: int, wall_s: float) -> Level:
    firsts = [stream.first_s * 1000 for stream in done]
    gaps = [gap * 1000 for stream in done for gap in stream.gaps_s]
    return Level(
        streams=streams,
        requests=len(done) + failed,
        failed=failed,
        tokens_per_s=sum(stream.tokens for stream in done) / wall_s,
        first_p50_ms=percentile(firsts, 50),
        first_p95_ms=percentile(firsts, 95),
        gap_p50_ms=percentile(gaps, 50),
        gap_p95_ms=percentile(gaps, 95),
    )


async def run_level(target: Target, streams: int, prompts: Iterable[str], max_tokens: int) -> Level:
    """Send every prompt, `streams` of them at a time. Answers that fail are counted, not raised."""
    todo = iter(prompts)
    done: list[Stream] = []
    failures: list[Exception] = []

    async def work(client: httpx.AsyncClient) -> None:
        for prompt in todo:
            try:
                done.append(await ask(client, target, prompt, max_tokens))
            except (httpx.HTTPError, BadAnswer) as error:
                failures.append(error)

    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(streams)))
        wall_s = time.perf_counter() - started
    if not done:
        raise BadAnswer(f"{target.name} answered no request: {failures[0]}")
    return summarize(streams, done, len(failures), wall_s)


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int) -> Stream:
    """One greedy completion. Raises BadAnswer or httpx.HTTPError."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    chunks: list[float] = []
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise BadAnswer(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for event in events(response.aiter_lines()):
            text, counted = read_event(event)
            tokens = counted or tokens
            if text:
                chunks.append(time.perf_counter())
    if not chunks or not tokens:
        raise BadAnswer("the stream held no text or no usage")
    return Stream(started, tuple(chunks), tokens)


async def events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events, up to [DONE]."""
    async for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield data


def read_event(data: str) -> tuple[str, int]:
    """The text of a chunk and the number of completion tokens, where it says them. Raises BadAnswer."""
    event = json.loads(data)
    if event.get("error"):
        raise BadAnswer(str(event["error"])[:200])
    choices = event.get("choices") or [{}]
    usage = event.get("usage") or {}
    return choices[0].get("text") or "", int(usage.get("completion_tokens") or 0)
