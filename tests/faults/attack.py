"""Hostile clients, in a process of their own: `python -m tests.faults.attack URL MODEL SECONDS SEED`.

Schemas and grammars that explode, maps of 50,000 entries, bodies of 200 MB and texts of 262,144 newlines, one
after the other. Prints how each kind was answered; ends with 1 where one was not refused.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import httpx

from tests.server.api.test_structured import BOMBS

CHAT = "/v1/chat/completions"
Attack = Callable[[httpx.Client, str, random.Random], int]


def ask(http: httpx.Client, model: str, **fields: object) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **fields}
    return http.post(CHAT, json=body).status_code


def bomb(http: httpx.Client, model: str, rng: random.Random) -> int:
    return ask(http, model, **rng.choice(list(BOMBS.values())))


def wide_map(http: httpx.Client, model: str, rng: random.Random) -> int:
    return ask(http, model, logit_bias={str(number): 1 for number in range(50_000)})


def newlines(http: httpx.Client, model: str, rng: random.Random) -> int:
    return ask(http, model, messages=[{"role": "user", "content": "\n" * 262_144}])


def flood(http: httpx.Client, model: str, rng: random.Random) -> int:
    try:
        body = iter([b"x" * 1_000_000] * 200)
        return http.post(CHAT, content=body, headers={"Content-Type": "application/json"}).status_code
    except httpx.TransportError:  # closed in the middle
        return 413


ATTACKS: tuple[Attack, ...] = (bomb, wide_map, newlines, flood)


def main(url: str, model: str, seconds: float, seed: int) -> int:
    rng, end = random.Random(seed), time.monotonic() + seconds
    statuses: dict[str, Counter[int]] = {attack.__name__: Counter() for attack in ATTACKS}
    with httpx.Client(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            attack = rng.choice(ATTACKS)
            statuses[attack.__name__][attack(http, model, rng)] += 1
    sys.stdout.write(json.dumps(statuses))
    return any(status not in (400, 413) for counts in statuses.values() for status in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
