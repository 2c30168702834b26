"""Tokens that nobody has taken yet: taken together, and too many of them hold the request."""

import asyncio

import pytest

from server.errors import EngineDied
from server.process.inbox import UNREAD, Inbox, joined, one_by_one
from server.types import Failed, TokenLogprobs, Tokens


def tokens(*ids: int, **fields: object) -> Tokens:
    return Tokens(id="r", tokens=ids, **fields)  # type: ignore[arg-type]


async def test_tokens_are_taken_together_and_in_order() -> None:
    inbox = Inbox(lambda on: None)
    inbox.put(tokens(1, cached_tokens=5))
    inbox.put(tokens(2))
    inbox.put(tokens(3, finish="stop", complete=True))
    assert await inbox.get() == tokens(1, 2, 3, cached_tokens=5, finish="stop", complete=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(inbox.get(), 0.01)


@pytest.mark.parametrize(
    "end", [Failed(id="r", code="engine_failed", message="no"), EngineDied("gone"), tokens(finish="abort")]
)
async def test_what_went_wrong_comes_after_what_went_well(end: Failed | EngineDied | Tokens) -> None:
    inbox = Inbox(lambda on: None)
    for event in (tokens(1), tokens(2), end):
        inbox.put(event)
    assert await inbox.get() == tokens(1, 2)
    assert await inbox.get() is end


async def test_a_reader_who_does_not_read_holds_the_request_once_and_lets_it_go_on_when_it_reads() -> None:
    said: list[bool] = []
    inbox = Inbox(said.append)
    for number in range(UNREAD):
        inbox.put(tokens(number))
    assert said == []
    inbox.put(tokens(64))
    inbox.put(tokens(65))
    assert said == [True]
    event = await inbox.get()
    assert isinstance(event, Tokens)
    assert event.tokens == tuple(range(66))
    assert said == [True, False]
    inbox.put(tokens(*range(UNREAD), finish="length"))
    assert said == [True, False]


def test_joined_and_taken_apart_again() -> None:
    scores = [TokenLogprobs(-float(number)) for number in range(4)]
    parts = [
        tokens(7, logprobs=(scores[0],), cached_tokens=3, prompt_logprobs=(scores[3],)),
        tokens(8, logprobs=(scores[1],)),
        tokens(9, logprobs=(scores[2],), finish="length"),
    ]
    together = joined(parts)
    assert together.tokens == (7, 8, 9)
    assert together.logprobs == tuple(scores[:3])
    assert one_by_one(together) == parts
    assert one_by_one(tokens(finish="length")) == [tokens(finish="length")]
