"""One step: the contract between the scheduler, which decides, and an executor, which computes.

A batch is slot operations, in order, and then rows. Slots are the executor's KV memory; a sequence may
lose its slot (preemption) and get another, so sampling state hangs on the sequence, never on the slot.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from server.types import Limits, SamplingParams, TokenLogprobs

Mask = Callable[[], bytes | None]
"""Which tokens may be sampled now: bit `i % 8` of byte `i // 8` is token i (packed words of 32 bits, least
significant first), a token beyond the last byte may not; None: all may. At least one bit is set.

It is computed when it is first called, which takes the CPU some tenths of a millisecond: an executor calls it
after it has started the forward pass and before it samples, once a row, from the thread that calls `submit`
and `collect`.
"""

PREVIOUS = -1  # as a row's token: the one sampled for this sequence by the step before


class SequenceView(Protocol):
    """What an executor may read of a sequence. `tokens` grows while steps are in flight."""

    @property
    def key(self) -> int:
        """Unique among all sequences this engine ever held."""
        ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def tokens(self) -> Seq[int]:
        """Prompt and committed answer."""
        ...

    @property
    def prompt_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Release:
    """Forget everything the slot holds."""

    slot: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Keep the first `keep` tokens of the slot, forget the rest."""

    slot: int
    keep: int


@dataclass(frozen=True, slots=True)
class CopyPrefix:
    """Let `target`, which is empty, start with the first `count` tokens of `source`."""

    source: int
    target: int
    count: int


SlotOp = Release | Trim | CopyPrefix


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sequence."""

    sequence: SequenceView
    slot: int
    start: int  # position of tokens[0]; the slot holds exactly the positions before it
    tokens: tuple[int, ...]
    samples: bool  # choose a token after the last position
    draw: int  # how many tokens of this answer were chosen before: the counter of its random numbers
    wants_prompt_logprobs: bool = False  # score, at each position, the prompt token that follows it
    mask: Mask | None = None  # bounds what is sampled, not what logprobs are taken over


@dataclass(frozen=True, slots=True)
class Batch:
    ops: tuple[SlotOp, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RowResult:
    """`token` is None for a row that does not sample.

    `prompt_logprobs[i]` scores the prompt token at position `start + i + 1`, read from `row.sequence.tokens`,
    given all before it. The prompt's last position has no prompt token after it, so a row that ends there
    has one entry fewer than tokens. Nothing needs to be kept from one row to the next.
    """

    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class StepFailed(Exception):
    """This step's rows could not be computed (out of memory, no room); its slot operations were carried out.

    The executor is still whole. What the slots of the failed rows hold from `row.start` on is undefined: the
    scheduler releases them.
    """


class Executor(Protocol):
    """Owns weights and KV memory. Knows no text, no stop rules, no HTTP."""

    @property
    def limits(self) -> Limits: ...

    @property
    def depth(self) -> int:
        """Steps that may be in flight: 1, or 2 where planning overlaps the device."""
        ...

    def submit(self, batch: Batch) -> object:
        """Start a step and return a ticket. Raises StepFailed."""
        ...

    def collect(self, ticket: object) -> Seq[RowResult]:
        """Wait for a step, in order of submission: one result a row. Raises StepFailed."""
        ...

    def forget(self, key: int) -> None:
        """The sequence has ended: drop its sampling state."""
        ...

    def close(self) -> None: ...
