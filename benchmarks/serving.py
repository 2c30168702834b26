"""Tokens a second, time to the first token and time between tokens, at several numbers of streams.

`python -m benchmarks.serving` starts a server on the bundled model and measures it over HTTP. With
`--peer-url` a second server, which runs already, gets the same prompts in the same run, level by level, and
the ratio of tokens a second is printed.
"""

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that the file can also be run by its path

from benchmarks.load import Level, Target, run_level  # noqa: E402
from benchmarks.machine import describe  # noqa: E402

START_LIMIT_S = 300.0
STOP_LIMIT_S = 40.0

SUBJECTS = (
    "the sea",
    "a small town",
    "winter",
    "the old bridge",
    "a lost letter",
    "music",
    "bread",
    "an island",
)
PLACES = ("north", "south", "east", "west", "middle")
STORY = (
    "({number}) Everybody in the {place} of the country knows a story about {subject}. Some say it began "
    "a long time ago, when there were no roads and people travelled only by day. Others remember it from "
    "school, where it was read aloud every year. This is story {number}, told as simply as possible.\n\n"
)


def prompts(first: int, count: int) -> list[str]:
    """Texts that differ from the first words on, so that no prefix of one is cached for another."""
    return [
        STORY.format(number=n, place=PLACES[n % len(PLACES)], subject=SUBJECTS[n % len(SUBJECTS)])
        for n in range(first, first + count)
    ]


@contextmanager
def own_server(source: str, variant: str, context: int, parallel: int) -> Iterator[Target]:
    """A server of ours in a process of its own, with an empty cache; ready when this yields."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", source, "--port", str(port)]
    command += ["--variant", variant, "--ctx", str(context), "--parallel", str(parallel)]
    with tempfile.TemporaryDirectory(prefix="quantserve-bench-") as cache:
        environ = {**os.environ, "QUANTSERVE_CACHE": cache, "QUANTSERVE_MEASURE_BUDGET": "0"}
        process = subprocess.Popen(command, cwd=ROOT, env=environ)
        target = Target(
            "quantserve", f"http://127.0.0.1:{port}", f"{Path(source).name}:{variant}", process.pid
        )
        try:
            wait_until_ready(process, target.url)
            yield target
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_LIMIT_S)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Raises SystemExit where the server ends or takes too long."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_LIMIT_S:.0f} s")


def measure(targets: Sequence[Target], streams: int, max_tokens: int, repeats: int) -> list[Level]:
    """For each target the run with the median throughput. Targets take turns."""
    runs: list[list[Level]] = [[] for _ in targets]
    for repeat in range(repeats):
        texts = prompts(1000 * streams + 100 * repeat, max(4, 2 * streams))
        for target, levels in zip(targets, runs, strict=True):
            levels.append(asyncio.run(run_level(target, streams, texts, max_tokens)))
    return [median_run(levels) for levels in runs]


def median_run(levels: Sequence[Level]) -> Level:
    middle = statistics.median_low(level.tokens_per_s for level in levels)
    return next(level for level in levels if level.tokens_per_s == middle)


COLUMNS = (
    "server", "streams", "requests", "failed", "tokens/s",
    "TTFT p50 ms", "TTFT p95 ms", "inter-token p50 ms", "inter-token p95 ms",
)  # fmt: skip
HEADER = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def row(name: str, level: Level) -> str:
    counts = f"{level.streams} | {level.requests} | {level.failed} | {level.tokens_per_s:.0f}"
    first = f"{level.first_p50_ms:.1f} | {level.first_p95_ms:.1f}"
    return f"| {name} | {counts} | {first} | {level.gap_p50_ms:.2f} | {level.gap_p95_ms:.2f} |"


def report(targets: Sequence[Target], streams: Sequence[int], max_tokens: int, repeats: int) -> None:
    for target in targets:
        asyncio.run(run_level(target, 1, prompts(1, 2), max_tokens))  # warm up
    print(HEADER)
    ratios = []
    for count in streams:
        own, *others = levels = measure(targets, count, max_tokens, repeats)
        for target, level in zip(targets, levels, strict=True):
            print(row(target.name, level), flush=True)
        ratios += [f"{own.tokens_per_s / peer.tokens_per_s:.2f} at {count} streams" for peer in others]
    if ratios:
        print(f"\ntokens/s, ours over the peer's: {', '.join(ratios)}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--source", default="models/tiny-chat", help="folder, GGUF file or hub id")
    parser.add_argument("--variant", default="q4_k_m")
    parser.add_argument("--ctx", type=int, default=1024, help="tokens of one request")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-url", help="another OpenAI-compatible server that serves the same model")
    parser.add_argument("--peer-model", default="peer", help="what the peer calls the model")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also then the server must be stopped
    print("\n".join(describe()))
    print(f"{args.source} as {args.variant}, greedy, up to {args.max_tokens} tokens, {args.repeats} runs\n")
    with own_server(args.source, args.variant, args.ctx, max(args.streams)) as own:
        peers = [Target("peer", args.peer_url, args.peer_model)] if args.peer_url else []
        report([own, *peers], args.streams, args.max_tokens, args.repeats)


if __name__ == "__main__":
    main(sys.argv[1:])
