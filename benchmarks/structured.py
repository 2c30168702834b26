"""How many answers of a given form and forced calls of functions are complete and valid, on a running server.

`python -m benchmarks.structured --base http://127.0.0.1:8000/v1 --model tiny-chat`
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that the file can also be run by its path

from benchmarks.schemas import Maker, Schema, functions  # noqa: E402

KEYWORDS = ("uniqueItems", "not", "format", "oneOf")  # those that benchmarks.schemas lets be refused
TOOL_SETS = 10


@dataclass
class Tally:
    asked: int = 0
    accepted: int = 0
    complete: int = 0
    valid: int = 0
    seconds: float = 0.0
    refusals: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)  # answers that ended and were wrong

    def line(self, name: str) -> str:
        return (
            f"{name}: asked {self.asked}, accepted {self.accepted}, complete {self.complete}, "
            f"valid {self.valid}, in {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Asking:
    http: httpx.AsyncClient
    model: str
    max_tokens: int = 512

    async def post(self, text: str, **fields: Any) -> httpx.Response:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.max_tokens,
            "temperature": 1,
            **fields,
        }
        return await self.http.post("/chat/completions", json=body, timeout=600)


async def try_schemas(asking: Asking, seeds: Sequence[int], width: int = 8) -> Tally:
    """One answer to each of the schemas with these seeds."""
    tally = Tally()

    async def one(seed: int) -> None:
        schema = Maker(seed).schema()
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        response = await asking.post("Write an example.", seed=seed, response_format=wanted)
        tally.asked += 1
        if response.status_code == 400:
            tally.refusals.append(response.json()["error"]["message"])
            return
        response.raise_for_status()
        choice = response.json()["choices"][0]
        tally.accepted += 1
        if choice["finish_reason"] == "stop":
            _count(tally, choice["message"]["content"], schema)

    await _all(tally, one, seeds, width)
    return tally


async def try_calls(asking: Asking, seeds: Sequence[int], width: int = 8) -> Tally:
    """A forced call for each seed, every other one streamed, over ten sets of functions."""
    tally = Tally()

    async def one(seed: int) -> None:
        tools = functions(seed % TOOL_SETS, 1 + seed % 3)
        named = {"type": "function", "function": {"name": "tool_0"}}
        fields = {"tools": tools, "tool_choice": named if seed % 4 == 3 else "required", "seed": seed}
        if seed % 2:
            name, arguments, finish = await _streamed(asking, fields)
        else:
            name, arguments, finish = _whole(await asking.post("Call one.", **fields))
        tally.asked += 1
        tally.accepted += 1
        if finish == "tool_calls":
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
            _count(tally, arguments, schemas[name])

    await _all(tally, one, seeds, width)
    return tally


def _whole(response: httpx.Response) -> tuple[str, str, str]:
    response.raise_for_status()
    choice = response.json()["choices"][0]
    calls = choice["message"].get("tool_calls") or [{"function": {"name": "", "arguments": ""}}]
    return calls[0]["function"]["name"], calls[0]["function"]["arguments"], choice["finish_reason"]


async def _streamed(asking: Asking, fields: dict[str, Any]) -> tuple[str, str, str]:
    response = await asking.post("Call one.", stream=True, **fields)
    response.raise_for_status()
    name = arguments = finish = ""
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line[6:])["choices"][0]
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls", ()):
            name += call["function"].get("name", "")
            arguments += call["function"]["arguments"]
    return name, arguments, finish


def _count(tally: Tally, text: str, schema: Schema) -> None:
    tally.complete += 1
    try:
        error = next(iter(Draft202012Validator(schema).iter_errors(json.loads(text))), None)
    except ValueError:
        error = "no JSON"
    if error is None:
        tally.valid += 1
    else:
        tally.invalid.append(f"{text} against {json.dumps(schema)}: {error}")


async def _all(tally: Tally, one: Callable[[int], Awaitable[None]], seeds: Sequence[int], width: int) -> None:
    start, gate = time.monotonic(), asyncio.Semaphore(width)

    async def bounded(seed: int) -> None:
        async with gate:
            await one(seed)

    await asyncio.gather(*map(bounded, seeds))
    tally.seconds = time.monotonic() - start


async def main(arguments: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=arguments.base) as http:
        asking = Asking(http, arguments.model)
        schemas = await try_schemas(asking, range(arguments.schemas))
        print(schemas.line("schemas"))
        named = sum(any(word in text for word in KEYWORDS) for text in schemas.refusals)
        print(f"refusals {len(schemas.refusals)}, of which name the keyword {named}")
        calls = await try_calls(asking, range(arguments.calls))
        print(calls.line("calls"))
        for problem in (*schemas.invalid, *calls.invalid):
            print("INVALID", problem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--calls", type=int, default=100)
    asyncio.run(main(parser.parse_args()))
