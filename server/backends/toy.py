"""Two executors for tests, with KV memory laid out like the real ones.

`Rows` keeps one list a slot and computes at once (llama.cpp's sequences); `Pages` keeps page tables with
shared pages and holds two steps in flight (paged KV on a GPU). Both "predict" the sum of all tokens
before, so that a wrong position, a lost token, a leaked page or a mixed-up slot changes the text.
"""

import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.engine.step import (
    PREVIOUS,
    Batch,
    CopyPrefix,
    Executor,
    Release,
    Row,
    RowResult,
    SlotOp,
    StepFailed,
    Trim,
)
from server.errors import RequestError
from server.types import Limits, ModelText, Open, SamplingParams, TokenLogprobs

VOCAB = 97
END = 96
CONTEXT = 256


def predict(context: Sequence[int], params: SamplingParams, draw: int) -> int:
    """The token after `context`. Above temperature 0 it also depends on the seed and the draw."""
    shift = hash((params.seed, draw)) if params.temperature else 0
    return (sum(context) + shift) % VOCAB


def allowed(token: int, mask: bytes | None) -> int:
    """The first token from `token` on, round the vocabulary, that the mask allows."""
    if mask is None:
        return token
    bits = int.from_bytes(mask, "little")
    return next(t % VOCAB for t in range(token, token + VOCAB) if bits >> (t % VOCAB) & 1)


def score(context: Sequence[int], token: int, count: int) -> TokenLogprobs:
    place = (sum(context) + token) % VOCAB
    top = tuple(((other - sum(context)) % VOCAB, -float(other) / VOCAB) for other in range(count))
    return TokenLogprobs(-float(place) / VOCAB, top, 1 + place)


class Rows:
    depth = 1

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots: dict[int, list[int]] = {}

    def apply(self, op: SlotOp) -> None:
        match op:
            case Release(slot):
                self.slots.pop(slot, None)
            case Trim(slot, keep):
                del self.slots[slot][keep:]
            case CopyPrefix(source, target, count):
                assert not self.slots.get(target), "the target of a copy is empty"
                assert len(self.slots[source]) >= count, "the source of a copy holds the prefix"
                self.slots[target] = self.slots[source][:count]

    def extend(self, row: Row, tokens: Sequence[int]) -> list[list[int]]:
        """Append the row's tokens; the context after each of them."""
        held = self.slots.setdefault(row.slot, [])
        assert len(held) == row.start, "position gap"
        held.extend(tokens)
        return [held[: row.start + i + 1] for i in range(len(tokens))]

    def close(self) -> None:
        self.slots.clear()


class Pages:
    depth = 2

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.page = limits.page
        self.free = list(range(-(-limits.kv_tokens // limits.page)))
        self.pool: dict[int, list[int]] = {}
        self.holders: dict[int, int] = {}
        self.table: dict[int, list[int]] = {}

    def apply(self, op: SlotOp) -> None:
        match op:
            case Release(slot):
                self._drop(self.table.pop(slot, []))
            case Trim(slot, keep):
                assert keep % self.page == 0, "slots are trimmed at page borders"
                pages = self.table[slot]
                self._drop(pages[keep // self.page :])
                del pages[keep // self.page :]
            case CopyPrefix(source, target, count):
                assert not self.table.get(target), "the target of a copy is empty"
                pages = self.table[source][: count // self.page]
                assert all(len(self.pool[p]) == self.page for p in pages), "shared pages are full"
                self.table[target] = list(pages)
                for page in pages:
                    self.holders[page] += 1

    def _drop(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.pool[page], self.holders[page]
                self.free.append(page)

    def extend(self, row: Row, tokens: Sequence[int]) -> list[list[int]]:
        pages = self.table.setdefault(row.slot, [])
        contexts = []
        for position, token in enumerate(tokens, start=row.start):
            if position == len(pages) * self.page:
                pages.append(self.free.pop())  # IndexError: the scheduler promised memory that is not there
                self.pool[pages[-1]], self.holders[pages[-1]] = [], 1
            last = self.pool[pages[-1]]
            assert (len(pages) - 1) * self.page + len(last) == position, "position gap"
            assert self.holders[pages[-1]] == 1, "a shared page is never written"
            last.append(token)
            contexts.append([t for p in pages for t in self.pool[p]])
        return contexts

    def close(self) -> None:
        for slot in list(self.table):
            self.apply(Release(slot))


class ToyExecutor:
    """Both layouts under the executor's contract. `fail_at` makes those steps fail, for tests."""

    def __init__(
        self, memory: Rows | Pages, delay_s: float = 0.0, fail_at: frozenset[int] = frozenset()
    ) -> None:
        self.memory = memory
        self.limits = memory.limits
        self.depth = memory.depth
        self.delay_s = delay_s
        self.fail_at = fail_at
        self.steps = 0
        self.last: dict[int, int] = {}  # sequence key -> the token sampled last

    def submit(self, batch: Batch) -> object:
        for op in batch.ops:
            self.memory.apply(op)
        self.steps += 1
        assert sum(len(row.tokens) for row in batch.rows) <= self.limits.step_tokens
        results = [self._run(row) for row in batch.rows]
        if self.steps not in self.fail_at:
            return results
        if self.depth == 1:
            raise StepFailed("made to fail when submitted")
        return StepFailed("made to fail when collected")

    def _run(self, row: Row) -> RowResult:
        sequence = row.sequence
        tokens = [self.last[sequence.key] if token == PREVIOUS else token for token in row.tokens]
        contexts = self.memory.extend(row, tokens)
        scores: tuple[TokenLogprobs, ...] = ()
        if row.wants_prompt_logprobs:
            following = sequence.tokens[row.start + 1 : sequence.prompt_tokens]
            most = sequence.params.prompt_logprobs or 0
            scores = tuple(score(c, t, most) for c, t in zip(contexts, following, strict=False))
        if not row.samples:
            return RowResult(None, prompt_logprobs=scores)
        mask = None if row.mask is None else row.mask()
        token = allowed(predict(contexts[-1], sequence.params, row.draw), mask)
        self.last[sequence.key] = token
        wanted = sequence.params.logprobs
        return RowResult(token, None if wanted is None else score(contexts[-1], token, wanted), scores)

    def collect(self, ticket: object) -> Sequence[RowResult]:
        if self.delay_s:
            time.sleep(self.delay_s)
        if isinstance(ticket, StepFailed):
            raise ticket
        assert isinstance(ticket, list)
        return ticket

    def forget(self, key: int) -> None:
        self.last.pop(key, None)

    def close(self) -> None:
        self.memory.close()


class ToyEmbedder:
    """Tells texts apart by how often each of four kinds of token is in them."""

    width = 4

    def embed(self, tokens: Sequence[int]) -> bytes:
        counts = [1.0 + sum(token % self.width == kind for token in tokens) for kind in range(self.width)]
        length = math.hypot(*counts)
        return struct.pack(f"<{self.width}f", *(count / length for count in counts))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ToyOpened:
    executor: Executor
    text: ModelText
    embedder: ToyEmbedder | None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if "\x00" in text:
            raise RequestError("the toy reads no NUL")
        return [min(max(byte - 32, 0), END - 1) for byte in text.encode()]


TEXT = ModelText(
    pieces=(*(bytes([32 + i]) for i in range(END)), b""),  # printable ASCII and DEL; the last is the end
    control=(END,),
    chat_template=None,
    bos=None,
    eos=END,
    end_ids=(END,),
    add_bos=False,
)


@dataclass(frozen=True)
class ToyBackend:
    """Opens anything. Options: `delay_s` for each step, `fail_at` (comma-separated step numbers).

    Only the rows make embeddings: not every backend does.
    """

    name: str
    memory: type[Rows] | type[Pages]
    formats: frozenset[str] = frozenset({"toy"})
    opens_any: bool = True  # but only where models.yaml names it

    def probe(self) -> str | None:
        return None

    def open(self, spec: Open, progress: Callable[[float], None]) -> ToyOpened:
        context = spec.context or CONTEXT
        limits = Limits(
            running=spec.parallel,
            slots=spec.parallel + 4,
            context=context,
            kv_tokens=spec.kv_tokens or context * spec.parallel,
            step_tokens=max(64, spec.parallel + 1),
        )
        progress(1.0)
        fail_at = frozenset(int(n) for n in spec.options.get("fail_at", "").split(",") if n)
        executor = ToyExecutor(self.memory(limits), float(spec.options.get("delay_s", "0")), fail_at)
        return ToyOpened(executor, TEXT, ToyEmbedder() if self.memory is Rows else None)


ROWS = ToyBackend("toy-rows", Rows)
PAGES = ToyBackend("toy-pages", Pages)
