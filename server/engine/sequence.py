"""One request inside an engine: its tokens, and how far they are computed."""

from dataclasses import dataclass, field

from server.engine.constrain import Constraint
from server.engine.prefix import Family, Resident
from server.types import FinishReason, Generate, SamplingParams, TokenLogprobs

OVERTAKEN = 8
LAST_PLACE = 256  # those after it are delayed no further


@dataclass(slots=True, eq=False)
class Sequence:
    request: Generate
    key: int  # order of arrival
    limit: int  # prompt and answer may grow to so many tokens
    tokens: list[int]  # prompt and the answer so far
    slot: int | None = None  # None while it waits
    computed: int = 0  # positions that the slot holds or will hold after the steps in flight
    in_flight: int = 0  # tokens being sampled in steps that are not committed
    finish: FinishReason | None = None
    cached_tokens: int = 0
    announced: bool = False  # its first event was sent
    held: bool = False  # nobody takes its tokens: it is not computed further
    constraint: Constraint | None = None
    prompt_scores: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def family(self) -> Family:
        return (self.request.salt, self.request.adapter, self.params.reproducible)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Smaller goes first; the greatest is preempted first.

        One request of many sequences does not hold up those that come after it, nor do they hold up its last
        ones for ever: each lets OVERTAKEN more pass than the one before.
        """
        delay = OVERTAKEN * min(self.request.place, LAST_PLACE)
        return (self.request.priority, self.key + delay, self.key)

    @property
    def pending(self) -> int:
        """Tokens known, or known to come from the step in flight, whose KV is not planned yet."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def known(self) -> int:
        """Positions of the slot whose tokens are known."""
        return min(self.computed, len(self.tokens))

    @property
    def resident(self) -> Resident:
        """What its slot holds that others may start from. Only while it is running.

        The answer was computed token by token. As part of a prompt it would be computed in pieces, with other
        last bits: a reproducible sequence shares its prompt alone.
        """
        assert self.slot is not None
        held = min(self.known, self.prompt_tokens) if self.params.reproducible else self.known
        return Resident(self.slot, self.tokens, held, self.family)

    @property
    def must_wait(self) -> bool:
        """Its next token depends on one that is still being sampled, so that it cannot be planned ahead."""
        return self.constraint is not None and self.in_flight > 0

    @property
    def wants_more(self) -> bool:
        """Another token may be sampled after those in flight, unless one of them ends the answer."""
        return len(self.tokens) + self.in_flight < self.limit

    @property
    def scores_prompt(self) -> bool:
        """Prompt logprobs are still owed."""
        return self.params.prompt_logprobs is not None and not self.announced

    @property
    def complete(self) -> bool:
        """Its grammar has ended."""
        return self.constraint is not None and self.constraint.ended

    def finish_after(self, token: int) -> FinishReason | None:
        if token in self.params.stop_ids or self.complete:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
