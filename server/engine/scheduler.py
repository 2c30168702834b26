"""Decides what runs next. Pure Python: no torch, no clock, no I/O.

Continuous batching with chunked prefill. Admission is optimistic: a sequence gets memory as it grows, and
when there is none left the youngest is preempted and computed again later, mostly from the prefix it left
behind. Finished sequences stay in their slots as cached prefixes until the room is needed.
"""

from bisect import insort

from msgspec.structs import replace

from server.engine.constrain import Constraint
from server.engine.lane import Lane, interruptible
from server.engine.prefix import Resident, best_match
from server.engine.sequence import Sequence
from server.engine.slots import SlotPool
from server.engine.step import PREVIOUS, Batch, Row, RowResult
from server.errors import ContextTooLong, EngineFailed, RequestError
from server.types import Event, Failed, FinishReason, Generate, Limits, Status, TokenLogprobs, Tokens


class Scheduler:
    """`plan` a batch, compute it, `commit` its results; up to two batches may be between the two calls.

    Invariants: every accepted request gets exactly one final event; as long as one request is unfinished and
    not held, and nothing is in flight, `plan` has rows.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots = SlotPool(limits)
        self._lane = Lane(limits.running)
        self.waiting: list[Sequence] = []  # sorted by rank
        self.running: dict[str, Sequence] = {}
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[int] = []  # keys that the executor may forget
        self._begun: list[str] = []  # ids of requests that got a slot
        self._arrivals = self._held = 0
        self._preemptions = self._prompt_tokens = self._cached_tokens = self._generated = self._steps = 0

    @property
    def busy(self) -> bool:
        """Something is to be computed."""
        return len(self._sequences) > self._held

    @property
    def status(self) -> Status:
        return Status(
            running=len(self.running),
            waiting=len(self.waiting),
            held=self._held,
            kv_used_tokens=self.slots.ledger.used_tokens,
            kv_total_tokens=self.slots.ledger.total * self.limits.page,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated,
            steps=self._steps,
        )

    def add(self, request: Generate, constraint: Constraint | None = None) -> None:
        """Accept a request. Raises RequestError for one that can never run; it then gets no event."""
        size, room = len(request.prompt), self.limits.context
        if not request.prompt:
            raise RequestError("the prompt has no tokens", param="prompt")
        if size + min(1, request.params.max_tokens) > room:
            raise ContextTooLong(
                f"the prompt has {size} tokens; with an answer it must fit into the context of {room} tokens"
            )
        if request.id in self._sequences:
            raise RequestError("a request with this id is running")
        if self.limits.deterministic:
            request = replace(request, params=replace(request.params, reproducible=True))
        limit = min(room, size + request.params.max_tokens)
        sequence = Sequence(request, self._arrivals, limit, list(request.prompt), constraint=constraint)
        if request.params.prompt_logprobs is not None:
            sequence.prompt_scores = [None] * (size - 1)
        self._arrivals += 1
        self._prompt_tokens += size
        self._sequences[request.id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def abort(self, request_id: str) -> Event | None:
        """End a request now. None where it is unknown or has ended already."""
        if (sequence := self._sequences.get(request_id)) is None:
            return None
        return self._final(sequence, "abort")

    def hold(self, request_id: str, on: bool) -> None:
        """Compute no more of a request, or go on with it. It keeps its slot until another one needs it."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.held != on:
            sequence.held = on
            self._held += 1 if on else -1

    # -- planning ---------------------------------------------------------------------------------

    def plan(self) -> Batch:
        """The next step; without rows there is nothing to do until something is committed or added."""
        self._admit()
        rows: list[Row] = []
        budget = self.limits.step_tokens
        for sequence in sorted(self.running.values(), key=_decode_first):
            take = self._chunk(sequence, budget)
            if take > 0 and self._may_run(sequence) and self._make_room(sequence, take, rows):
                rows.append(self._row(sequence, take))
                budget -= take
        self._steps += bool(rows)
        return Batch(self.slots.take_ops(), tuple(rows))

    def _may_run(self, sequence: Sequence) -> bool:
        if sequence.held or sequence.must_wait:
            return False
        if sequence.slot is None:  # preempted while this was planned
            return False
        return sequence.wants_more or sequence.computed < sequence.prompt_tokens

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute now. Prompts are cut at page borders, whatever else is in the step.

        Where a step leaves less than a page, a reproducible one waits for a step that leaves more.
        """
        if sequence.pending <= budget:
            return sequence.pending
        aligned = budget - (sequence.computed + budget) % self.limits.page
        if aligned > 0:
            return aligned
        comes = self.limits.step_tokens >= self.limits.running + self.limits.page
        return 0 if comes and sequence.params.reproducible else budget

    def _row(self, sequence: Sequence, take: int) -> Row:
        assert sequence.slot is not None
        start, end = sequence.computed, sequence.computed + take
        tokens = sequence.tokens[start:end]
        tokens += [PREVIOUS] * (take - len(tokens))
        samples = take == sequence.pending and sequence.wants_more
        row = Row(
            sequence=sequence,
            slot=sequence.slot,
            start=start,
            tokens=tuple(tokens),
            samples=samples,
            draw=len(sequence.tokens) + sequence.in_flight - sequence.prompt_tokens,
            mask=sequence.constraint.mask if samples and sequence.constraint is not None else None,
            wants_prompt_logprobs=sequence.scores_prompt and start < sequence.prompt_tokens - 1,
        )
        sequence.computed = end
        sequence.in_flight += samples
        return row

    # -- admission --------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if not sequence.held and not (self._has_slot() and self._fit_in(sequence)):
                break  # nobody overtakes: else a long prompt could wait for ever
        else:
            return
        self._admit_by_lane()

    def _has_slot(self) -> bool:
        taken = len(self.running) + self._lane.keeps_a_slot(self._steps)
        return taken < self.limits.running or self._displace_held()

    def _fit_in(self, sequence: Sequence) -> bool:
        """Place it in a slot, or let it wait for a sibling. False where memory has no room for it."""
        assert not sequence.in_flight, "a step was committed since it was preempted"
        match, shared = self._match(sequence)
        if self._sibling_brings_more(sequence, shared):
            return True
        while self.running and not self.slots.fits(len(sequence.tokens) + 1, shared):
            if not self._displace_held():
                return False
            match, shared = self._match(sequence)
        self._place(sequence, match, shared)
        return True

    def _admit_by_lane(self) -> None:
        sequence = self._lane.next_user(self.waiting)
        if sequence is None:
            return
        if len(self.running) == self.limits.running and not (
            self._displace_held() or self._interrupt(sequence)
        ):
            return
        self._lane.open(self._steps)
        self._fit_in(sequence)
        self._lane.enter(sequence)

    def _interrupt(self, user: Sequence) -> bool:
        """Take the slot of the long answer that has least to compute again; False: there is none."""
        able = [s for s in self.running.values() if interruptible(s, user)]
        if able:
            self._preempt(min(able, key=lambda s: (len(s.tokens), s.key)))
        return bool(able)

    def _displace_held(self) -> bool:
        """Take the slot of a sequence whose reader does not read; False: there is none."""
        held = [s for s in self.running.values() if s.held and not s.in_flight]
        if held:
            self._preempt(max(held, key=_rank))
        return bool(held)

    def _match(self, sequence: Sequence) -> tuple[Resident | None, int]:
        """The best prefix at hand. Scoring a prompt needs all its logits: no prefix then."""
        if sequence.scores_prompt:
            return None, 0
        active = [s.resident for s in self.running.values()]
        return self.slots.match(sequence.tokens, sequence.family, active)

    def _sibling_brings_more(self, sequence: Sequence, shared: int) -> bool:
        """A running sequence is about to compute more of the same prefix: cheaper to wait for it."""
        if sequence.scores_prompt:
            return False
        promised = [
            Resident(-1, s.tokens, s.prompt_tokens, s.family)
            for s in self.running.values()
            if s.known < s.prompt_tokens and not s.held
        ]
        _, length = best_match(sequence.tokens, sequence.family, promised)
        return length - length % self.limits.page > shared + self.limits.page

    def _place(self, sequence: Sequence, match: Resident | None, shared: int) -> None:
        taken = {s.resident.slot for s in self.running.values()}
        sequence.slot, sequence.computed = self.slots.occupy(match, shared, taken), shared
        if not sequence.announced:
            self._begun.append(sequence.request.id)
            sequence.cached_tokens = shared
            self._cached_tokens += shared
        self.waiting.remove(sequence)
        self.running[sequence.request.id] = sequence

    # -- memory -----------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, take: int, planned: list[Row]) -> bool:
        """Give the sequence pages for `take` more tokens; False where it cannot run in this step."""
        assert sequence.slot is not None
        size = sequence.computed + take
        busy = {row.sequence.key for row in planned}
        while not self.slots.has_room(sequence.slot, size):
            victim = max((s for s in self.running.values() if s.key not in busy), key=_held_first)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.slots.grow(sequence.slot, size)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._leave_slot(sequence)
        insort(self.waiting, sequence, key=_rank)

    def _leave_slot(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a running sequence out of its slot."""
        del self.running[sequence.request.id]
        self.slots.vacate(sequence.resident, keep=keep)
        sequence.slot, sequence.computed = None, 0

    # -- results ----------------------------------------------------------------------------------

    def commit(self, batch: Batch, results: list[RowResult]) -> list[Event]:
        """Take a step's results, in the order of planning; rows of ended sequences are dropped."""
        events: list[Event] = []
        for row, result in zip(batch.rows, results, strict=True):
            sequence = row.sequence
            assert isinstance(sequence, Sequence)
            if sequence.finish is not None:
                continue
            if row.wants_prompt_logprobs:
                sequence.prompt_scores[row.start : row.start + len(result.prompt_logprobs)] = (
                    result.prompt_logprobs
                )
            if (event := self._advance(sequence, row, result)) is not None:
                events.append(event)
        return events

    def _advance(self, sequence: Sequence, row: Row, result: RowResult) -> Event | None:
        if not row.samples:
            scored = row.start + len(row.tokens) >= sequence.prompt_tokens and not sequence.params.max_tokens
            return self._final(sequence, "length") if scored else None
        assert result.token is not None
        sequence.in_flight -= 1
        sequence.tokens.append(result.token)
        self._generated += 1
        logprobs = None if result.logprobs is None else (result.logprobs,)
        if (constraint := sequence.constraint) is not None:
            constraint.take(result.token)
            if constraint.error is not None:
                return self._off_grammar(sequence, constraint.error)
        if finish := sequence.finish_after(result.token):
            return self._final(sequence, finish, (result.token,), logprobs)
        return self._event(sequence, (result.token,), logprobs)

    def _off_grammar(self, sequence: Sequence, error: str) -> Event:
        grammar = sequence.request.grammar
        self._end(sequence, "abort")
        param = None if grammar is None else grammar.param
        return Failed(
            id=sequence.request.id, code=RequestError.code, message=f"{param}: {error}", param=param
        )

    def take_ended(self) -> list[int]:
        """Keys of the sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def take_begun(self) -> list[str]:
        """Ids of the requests that got a slot since the last call; twice where one lost it at once."""
        begun, self._begun = self._begun, []
        return begun

    def fail(self, batches: list[Batch], reason: str) -> list[Event]:
        """Steps that could not be computed: the youngest sequence pays, the others start again."""
        failed = {id(row.sequence): row.sequence for batch in batches for row in batch.rows}
        sequences = [s for s in failed.values() if isinstance(s, Sequence) and s.finish is None]
        for sequence in sequences:
            sequence.in_flight = 0
            if sequence.slot is not None:
                self._leave_slot(sequence, keep=False)
                insort(self.waiting, sequence, key=_rank)
        if not sequences:
            return []
        youngest = max(sequences, key=_rank)
        self._end(youngest, "abort")
        return [Failed(id=youngest.request.id, code=EngineFailed.code, message=reason)]

    def _final(
        self,
        sequence: Sequence,
        finish: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> Event:
        event = self._event(sequence, tokens, logprobs, finish)
        self._end(sequence, finish)
        return event

    def _end(self, sequence: Sequence, finish: FinishReason) -> None:
        sequence.finish = finish
        self._held -= sequence.held
        self._ended.append(sequence.key)
        del self._sequences[sequence.request.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave_slot(sequence)

    def _event(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
        finish: FinishReason | None = None,
    ) -> Tokens:
        first, sequence.announced = not sequence.announced, True
        scores = tuple(score for score in sequence.prompt_scores if score is not None) if first else None
        return Tokens(
            id=sequence.request.id,
            tokens=tokens,
            logprobs=logprobs,
            finish=finish,
            complete=finish == "stop" and tokens[-1] not in sequence.params.stop_ids,
            cached_tokens=sequence.cached_tokens if first else None,
            prompt_logprobs=scores if first and sequence.params.prompt_logprobs is not None else None,
        )


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _held_first(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    return sequence.held, sequence.rank


def _decode_first(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    return sequence.pending > 1, sequence.rank
