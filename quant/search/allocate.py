"""Which type each group gets, from what each costs in bytes and in divergence. Pure.

Small divergences of groups add up, so the best mixtures are those at which no group could exchange bytes for
divergence at a better rate than another: every group walks down the convex hull of its choices, and the
steps of all groups are taken in the order of their rates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Choice:
    kind: str
    bytes: int
    loss: float  # nats a token


@dataclass(frozen=True, slots=True)
class Step:
    group: str
    saved: int  # bytes
    lost: float
    to: Choice

    @property
    def rate(self) -> float:
        return self.lost / self.saved


def smallest(groups: Mapping[str, Sequence[Choice]], most_loss: float) -> dict[str, str]:
    """The fewest bytes at which losses add up to `most_loss` at most; all at their best if none does."""
    loss = sum(hull(choices)[0].loss for choices in groups.values())
    found = {name: hull(choices)[0].kind for name, choices in groups.items()}
    stuck: set[str] = set()
    for step in _steps(groups):
        if step.group in stuck:
            continue
        if loss + step.lost > most_loss:
            stuck.add(step.group)  # another group's step may still fit
            continue
        loss += step.lost
        found[step.group] = step.to.kind
    return found


def best(groups: Mapping[str, Sequence[Choice]], most_bytes: int) -> dict[str, str] | None:
    """The least loss within so many bytes; None where even the coarsest choices are too large."""
    taken = {name: hull(choices)[0] for name, choices in groups.items()}
    size = sum(choice.bytes for choice in taken.values())
    done: list[Step] = []
    for step in _steps(groups):
        if size <= most_bytes:
            break
        size -= step.saved
        taken[step.group] = step.to
        done.append(step)
    if size > most_bytes:
        return None
    return _taken_back(taken, done, groups, most_bytes - size)


def _taken_back(
    taken: Mapping[str, Choice], done: Sequence[Step], groups: Mapping[str, Sequence[Choice]], room: int
) -> dict[str, str]:
    """The last step saved more than was needed: earlier ones are taken back where there is room."""
    found = dict(taken)
    for step in sorted(done, key=lambda one: -one.lost):
        if found[step.group] == step.to and step.saved <= room:
            room -= step.saved
            above = hull(groups[step.group])
            found[step.group] = above[above.index(step.to) - 1]
    return {name: choice.kind for name, choice in found.items()}


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no mixture of two others beats, from the largest to the smallest."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (-one.bytes, one.loss)):
        if found and choice.bytes == found[-1].bytes:
            continue
        while found and choice.loss <= found[-1].loss:  # smaller and no worse
            found.pop()
        while len(found) > 1 and _rate(found[-2], choice) <= _rate(found[-2], found[-1]):
            found.pop()
        found.append(choice)
    return found


def _rate(above: Choice, below: Choice) -> float:
    return (below.loss - above.loss) / (above.bytes - below.bytes)


def _steps(groups: Mapping[str, Sequence[Choice]]) -> list[Step]:
    rate: Callable[[Step], tuple[float, str]] = lambda step: (step.rate, step.group)  # noqa: E731
    return sorted((step for name, choices in groups.items() for step in _down(name, choices)), key=rate)


def _down(name: str, choices: Sequence[Choice]) -> Iterator[Step]:
    line = hull(choices)
    for above, below in pairwise(line):
        yield Step(name, above.bytes - below.bytes, below.loss - above.loss, below)
