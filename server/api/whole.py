"""A complete answer, collected from the parts of `ask`."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from server.api.choice import Delta, Finish, Scored
from server.api.generate import Begun, Part, Tally
from server.text.calls import CallDelta


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    prompt: list[Scored] = field(default_factory=list)
    finish: Finish | None = None
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    stop: str | None = None  # the stop string that ended it

    @property
    def mean_logprob(self) -> float:
        """Of its own tokens: an echoed prompt is the same for all candidates."""
        values = [scored.logprobs.logprob for scored in self.scored if scored.logprobs is not None]
        return sum(values) / len(values) if values else float("-inf")


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer to a request: `answers[prompt * candidates + candidate]`."""

    begun: Begun
    answers: list[Answer]
    tally: Tally


async def collect(parts: AsyncGenerator[Part]) -> Whole:
    answers: dict[int, Answer] = {}
    begun: Begun | None = None
    tally = Tally()
    async with aclosing(parts):
        async for part in parts:
            match part:
                case Begun():
                    begun = part
                case Delta():
                    answer = answers.setdefault(part.index, Answer())
                    answer.text += part.text
                    answer.reasoning += part.reasoning
                    _add_calls(answer.calls, part.calls)
                    answer.scored += part.scored
                    answer.prompt += part.prompt
                    answer.finish, answer.stop = part.finish, part.stop
                case Tally():
                    tally = part
    assert begun is not None, "a request that ends without an error has begun"
    return Whole(begun, [answers[index] for index in sorted(answers)], tally)


def _add_calls(calls: list[Call], deltas: Sequence[CallDelta]) -> None:
    for delta in deltas:
        if delta.name is not None:
            calls.append(Call(delta.id or "", delta.name))
        calls[delta.index].arguments += delta.arguments
