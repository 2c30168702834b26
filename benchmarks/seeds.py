"""How often a seed gives the same text alone and beside other streams, and what that costs.

`python -m benchmarks.seeds` starts a server on the bundled model, asks for every answer alone, then for all
of them with 16 streams at once, half of the company without a seed. Ends with 1 where fewer than 95 of
100 agree.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that the file can also be run by its path

from benchmarks.load import TIMEOUT_S, Target  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.serving import own_server, prompts  # noqa: E402

ENOUGH = 0.95


async def answers(
    target: Target, texts: Sequence[str], seeds: Sequence[int | None], streams: int, max_tokens: int
) -> tuple[list[str], float]:
    """The answers in order, `streams` at a time, and the tokens a second."""
    tokens = 0
    gate = asyncio.Semaphore(streams)

    async def one(client: httpx.AsyncClient, text: str, seed: int | None) -> str:
        nonlocal tokens
        body = {"model": target.model, "prompt": text, "max_tokens": max_tokens, "temperature": 1.0}
        async with gate:
            response = await client.post(
                "/v1/completions", json=body if seed is None else body | {"seed": seed}
            )
        response.raise_for_status()
        answer = response.json()
        tokens += answer["usage"]["completion_tokens"]
        return str(answer["choices"][0]["text"])

    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()
        found = await asyncio.gather(
            *(one(client, text, seed) for text, seed in zip(texts, seeds, strict=True))
        )
        return list(found), tokens / (time.perf_counter() - started)


async def compare(target: Target, count: int, streams: int, max_tokens: int) -> float:
    """The share of equal answers."""
    texts = prompts(1, count)
    seeds: list[int | None] = list(range(count))
    await answers(target, texts[:2], seeds[:2], 1, max_tokens)  # warm up
    alone, slow = await answers(target, texts, seeds, 1, max_tokens)
    _, seeded = await answers(target, texts, seeds, streams, max_tokens)
    _, free = await answers(target, texts, [None] * count, streams, max_tokens)
    # in pairs, one with a seed and one without, so that every stream has both in its company
    both = [text for text in texts for _ in range(2)]
    paired = [seed for number in range(count) for seed in (number, None)]
    mixed, _ = await answers(target, both, paired, streams, max_tokens)
    equal = sum(one == other for one, other in zip(alone, mixed[::2], strict=True))
    print(f"the same text alone and beside {streams - 1} others: {equal} of {count}")
    print(f"tokens/s: {slow:.0f} alone, at {streams} streams {seeded:.0f} with seeds, {free:.0f} without")
    return equal / count


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--source", default="models/tiny-chat", help="folder, GGUF file or hub id")
    parser.add_argument("--variant", default="q4_k_m")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also then the server must be stopped
    print("\n".join(describe()))
    print(f"{args.source} as {args.variant}, temperature 1, {args.max_tokens} tokens\n")
    with own_server(args.source, args.variant, 1024, args.streams) as own:
        share = asyncio.run(compare(own, args.count, args.streams, args.max_tokens))
    return int(share < ENOUGH)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
