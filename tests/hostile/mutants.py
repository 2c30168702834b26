"""Thousands of spoilt requests against a running server.

`python -m tests.hostile.mutants --base URL --model NAME --pid PID [--key K]` sends 10,000 of them, from three
seeds, and ends with 1 where an answer was a 5xx (503 with Retry-After is none), a connection was dropped, an
answer took more than 15 s, the server and its engines grew by more than 256 MiB, or too few reached a model.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.hostile.operators import GENTLE, RAW, ROUGH, Mutant, mutant

SEEDS = (1, 2, 3)
SLOWEST_S = 15.0
MOST_GROWTH = 256 * 2**20
REACHED = 0.4
STREAMS = 4
SHAPES = ({"message", "type", "param", "code"}, {"message", "type"})  # OpenAI's and Anthropic's


@dataclass
class Report:
    sent: int = 0
    reached: int = 0  # a model answered
    slowest_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, sent: Mutant, response: httpx.Response, seconds: float) -> None:
        self.sent += 1
        self.statuses[response.status_code] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        self.reached += response.status_code == 200 and sent.path.startswith("/v1")
        if fault := self._fault(response, seconds):
            self.fault(sent, fault)

    def fault(self, sent: Mutant, what: str) -> None:
        self.faults.append(f"{what}: {sent.path} {sent.operators} {sent.data[:300]!r}")

    def _fault(self, response: httpx.Response, seconds: float) -> str | None:
        waits = response.status_code == 503 and "retry-after" in response.headers
        if response.status_code >= 500 and not waits:
            return f"status {response.status_code} {response.text[:200]}"
        if '"code":"internal_error"' in response.text or '"code":"engine_' in response.text:
            return f"a stream broke off {response.text[-200:]}"
        if "Traceback" in response.text or "site-packages" in response.text:
            return "a traceback"
        if response.status_code >= 400 and set(response.json()["error"]) not in SHAPES:
            return "another shape"
        return f"{seconds:.1f} s" if seconds > SLOWEST_S else None


async def attack(http: httpx.AsyncClient, mutants: Iterator[Mutant], report: Report) -> None:
    """Send them all, a few at a time."""

    async def work() -> None:
        for sent in mutants:
            started = time.perf_counter()
            try:
                response = await http.post(sent.path, content=sent.data, headers=sent.headers)
            except httpx.TransportError as error:
                report.fault(sent, f"no answer, {type(error).__name__}")
                continue
            report.add(sent, response, time.perf_counter() - started)

    await asyncio.gather(*(work() for _ in range(STREAMS)))


def made(model: str, seed: int, count: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    return (mutant(model, rng) for _ in range(count))


def memory(pid: int) -> int:
    """Bytes in memory of a process and its children."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(memory(int(child)) for child in children)


async def run(base: str, model: str, key: str, pid: int, count: int) -> int:
    operators = len({*GENTLE, *ROUGH, *RAW})
    report = Report()
    async with httpx.AsyncClient(
        base_url=base, timeout=60, headers={"authorization": f"Bearer {key}"}
    ) as http:
        await attack(http, made(model, 0, 200), Report())  # what is loaded once is no growth
        before = memory(pid)
        for number, seed in enumerate(SEEDS):
            part = count // len(SEEDS) + (number < count % len(SEEDS))
            await attack(http, made(model, seed, part), report)
        growth = memory(pid) - before
    share = report.reached / report.sent
    print(f"{report.sent} mutants by {operators} operators, {share:.0%} reached a model")
    print(f"statuses {dict(sorted(report.statuses.items()))}, slowest {report.slowest_s:.1f} s")
    print(f"memory grew by {growth / 2**20:.0f} MiB; {len(report.faults)} faults")
    print("\n".join(report.faults[:20]))
    return int(bool(report.faults) or growth > MOST_GROWTH or share < REACHED)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.mutants", description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--key", default="none")
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args(argv)
    return asyncio.run(run(args.base, args.model, args.key, args.pid, args.count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
