"""Tokens chosen on the device, for rows with different parameters at once.

The order of operations is that of the llama backend: mask, bias, repetition penalty (prompt and answer),
frequency and presence penalty (answer), temperature, top-k, top-p, min-p. Random numbers are counters hashed
on the host (`uniform`), one a token, so that they do not depend on the batch; and each row's numbers are laid
out by its own parameters alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from server.backends.llama.sampling import COLDEST, Tally, banned, uniform
from server.backends.torch_.transfer import numbers_to_device, to_device
from server.engine.step import SequenceView
from server.types import SamplingParams, TokenLogprobs

FEW = 256  # a top-k up to here needs no sorted vocabulary
Kind = Callable[[Tensor, "Knobs"], Tensor]


class Drawer:
    """What sampling has to remember of one sequence: its bias and how often its tokens occur."""

    def __init__(self, sequence: SequenceView, vocab_size: int) -> None:
        params = self.params = sequence.params
        self.bias = {token: value for token, value in params.logit_bias if 0 <= token < vocab_size}
        self.everything = Tally(0) if params.repetition_penalty != 1.0 else None
        penalized = params.presence_penalty or params.frequency_penalty
        self.answer = Tally(sequence.prompt_tokens) if penalized else None
        self.adjusts = bool(self.bias) or self.everything is not None or self.answer is not None


@dataclass(frozen=True, slots=True)
class Choice:
    """One token to choose: the one at position `end`."""

    drawer: Drawer
    tokens: Sequence[int]
    end: int
    draw: int
    slot: int  # whose last token the device knows, if the host does not yet
    mask: bytes | None = None  # the tokens that may be chosen; see server.engine.step.Mask

    @property
    def params(self) -> SamplingParams:
        return self.drawer.params

    @property
    def adjusts(self) -> bool:
        return self.mask is not None or self.drawer.adjusts


@dataclass(slots=True)
class Entries:
    """Places of a matrix and numbers for them, gathered on the host."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def extend(self, row: int, columns: Sequence[int], values: Sequence[float]) -> None:
        self.rows += [row] * len(columns)
        self.columns += columns
        self.values += values

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        places = to_device(torch.tensor([self.rows, self.columns], dtype=torch.int64), device)
        return places[0], places[1], to_device(torch.tensor(self.values), device)


def choose(logits: Tensor, best: Tensor, choices: Sequence[Choice], last: Tensor) -> Tensor:
    """logits float32 [rows, vocabulary], not written to -> tokens int64 [rows].

    `best` [rows]: where each row is largest. `last` [slots]: the tokens chosen last, for the one that is not
    in `tokens` yet. A row that is no distribution gives any token.
    """
    adjusted = [row for row, choice in enumerate(choices) if choice.adjusts]
    if adjusted:
        logits = logits.clone()
        _adjust(logits, [(row, choices[row]) for row in adjusted], last)
    chosen = logits.argmax(-1) if adjusted else best.clone()
    warm = [row for row, choice in enumerate(choices) if choice.params.temperature > 0.0]
    for kind in (_from_few, _from_sorted, _from_all):
        rows = [row for row in warm if _kind(choices[row].params) is kind]
        if len(rows) == len(choices):
            return kind(logits, Knobs.of(choices, logits.device))
        if rows:
            index = numbers_to_device(rows, logits.device)
            chosen[index] = kind(logits[index], Knobs.of([choices[row] for row in rows], logits.device))
    return chosen


# -- bias and penalties -------------------------------------------------------------------------------


def _adjust(logits: Tensor, choices: Sequence[tuple[int, Choice]], last: Tensor) -> None:
    biases, seen, counts, penalties = Entries(), Entries(), Entries(), Entries()
    for row, choice in choices:
        drawer, params, known = choice.drawer, choice.params, min(choice.end, len(choice.tokens))
        biases.extend(row, list(drawer.bias), list(drawer.bias.values()))
        if drawer.everything is not None:
            ids, _ = drawer.everything.advance(choice.tokens, known)
            seen.extend(row, ids.tolist(), [params.repetition_penalty] * len(ids))
        if drawer.answer is not None:
            ids, found = drawer.answer.advance(choice.tokens, known)
            counts.extend(row, ids.tolist(), (found * params.frequency_penalty).tolist())
            penalties.extend(row, ids.tolist(), [params.presence_penalty] * len(ids))
    _ban(logits, [(row, choice.mask) for row, choice in choices if choice.mask is not None])
    flying = [(row, choice) for row, choice in choices if choice.end > len(choice.tokens)]
    penalize = _Penalize(logits, flying, last)
    if biases.rows:
        rows, columns, values = biases.to(logits.device)
        logits.index_put_((rows, columns), values, accumulate=True)
    penalize.scale(logits, seen)
    penalize.subtract(logits, counts)
    penalize.lower(logits, penalties)


def _ban(logits: Tensor, masks: Sequence[tuple[int, bytes]]) -> None:
    if not masks:
        return
    rows = numbers_to_device([row for row, _ in masks], logits.device)
    out = torch.from_numpy(np.stack([banned(mask, logits.shape[1]) for _, mask in masks]))
    logits[rows] = logits[rows].masked_fill(to_device(out, logits.device), float("-inf"))


class _Penalize:
    """Applies penalties, also to the token of each row that only the device knows so far."""

    def __init__(self, logits: Tensor, flying: Sequence[tuple[int, Choice]], last: Tensor) -> None:
        self._flying = flying
        self._device = logits.device
        slots = [choice.slot for _, choice in flying]
        self._tokens = last[numbers_to_device(slots, last.device)] if flying else None

    def _with(self, entries: Entries, wanted: list[tuple[int, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
        """The entries, and (row, place in `flying`, value) for tokens in flight."""
        rows, columns, values = entries.to(self._device)
        if not wanted:
            return rows, columns, values
        assert self._tokens is not None
        more = Entries([w[0] for w in wanted], [w[1] for w in wanted], [w[2] for w in wanted])
        also_rows, places, also_values = more.to(self._device)
        return (
            torch.cat((rows, also_rows)),
            torch.cat((columns, self._tokens[places])),
            torch.cat((values, also_values)),
        )

    def scale(self, logits: Tensor, entries: Entries) -> None:
        """Repetition penalty. A place that is named twice gets the same value twice."""
        wanted = [
            (row, place, choice.params.repetition_penalty)
            for place, (row, choice) in enumerate(self._flying)
            if choice.drawer.everything is not None
        ]
        if entries.rows or wanted:
            rows, columns, penalty = self._with(entries, wanted)
            values = logits[rows, columns]
            logits[rows, columns] = torch.where(values > 0, values / penalty, values * penalty)

    def subtract(self, logits: Tensor, entries: Entries) -> None:
        """Frequency penalty: places that are named twice count twice."""
        wanted = [
            (row, place, choice.params.frequency_penalty)
            for place, (row, choice) in enumerate(self._flying)
            if choice.drawer.answer is not None
        ]
        if entries.rows or wanted:
            rows, columns, values = self._with(entries, wanted)
            logits.index_put_((rows, columns), -values, accumulate=True)

    def lower(self, logits: Tensor, entries: Entries) -> None:
        """Presence penalty: once for each place, however often it is named."""
        wanted = [
            (row, place, choice.params.presence_penalty)
            for place, (row, choice) in enumerate(self._flying)
            if choice.drawer.answer is not None
        ]
        if entries.rows or wanted:
            rows, columns, values = self._with(entries, wanted)
            logits[rows, columns] = logits[rows, columns] - values


# -- drawing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Knobs:
    """Parameters of the rows as columns, [rows, 1]."""

    scale: Tensor  # float32, 1 / temperature
    top_k: Tensor  # int64, the vocabulary's size or more where there is no cut
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    point: Tensor  # float64, in [0, 1)

    @classmethod
    def of(cls, choices: Sequence[Choice], device: torch.device) -> "Knobs":
        params = [choice.params for choice in choices]
        table = torch.tensor(
            [
                [1.0 / max(p.temperature, COLDEST) for p in params],
                [float(p.top_k or 1 << 40) for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
                [uniform(c.params.seed, c.draw) for c in choices],
            ],
            dtype=torch.float64,
        )
        numbers = to_device(table, device)[:, :, None]
        return cls(numbers[0].float(), numbers[1].long(), numbers[2], numbers[3].float(), numbers[4])


def _kind(params: SamplingParams) -> Kind:
    if 0 < params.top_k <= FEW:
        return _from_few
    return _from_sorted if params.top_k or params.top_p < 1.0 or params.min_p > 0.0 else _from_all


def _from_few(logits: Tensor, knobs: Knobs) -> Tensor:
    ids = top_ids(logits, FEW)  # as many for every row: sums then do not depend on what other rows ask for
    return _from_falling(logits.gather(1, ids), ids, knobs)


def _from_sorted(logits: Tensor, knobs: Knobs) -> Tensor:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return _from_falling(values, ids, knobs)


def _from_all(logits: Tensor, knobs: Knobs) -> Tensor:
    weights = ((logits - logits.amax(-1, keepdim=True)) * knobs.scale).exp()
    running = weights.cumsum(-1, dtype=torch.float64)
    return _pick(running, running[:, -1:], knobs.point)[:, 0]


def _from_falling(values: Tensor, ids: Tensor, knobs: Knobs) -> Tensor:
    """`values`, largest first, of the tokens `ids`. Every cut keeps a first part of them, at least one."""
    weights = ((values - values[:, :1]) * knobs.scale).exp()
    weights = weights * (torch.arange(values.shape[1], device=values.device) < knobs.top_k)
    running = weights.cumsum(-1, dtype=torch.float64)
    size = torch.searchsorted(running, knobs.top_p * running[:, -1:]) + 1
    size = torch.where(knobs.top_p < 1.0, size, weights.shape[1]).minimum(knobs.top_k)
    size = size.minimum((weights >= knobs.min_p).sum(-1, keepdim=True)).clamp(1, weights.shape[1])
    total = running.gather(1, size - 1)
    return ids.gather(1, _pick(running, total, knobs.point).minimum(size - 1))[:, 0]


def _pick(running: Tensor, total: Tensor, point: Tensor) -> Tensor:
    """Index [rows, 1] of the weight on which the point falls; if rounding goes past the end, of the last."""
    total = total.contiguous()
    past = torch.searchsorted(running, point * total, right=True)
    return past.minimum(torch.searchsorted(running, total))


def top_ids(logits: Tensor, count: int) -> Tensor:
    """Ids [rows, count] of the largest values, largest first; the lower id first where they are equal.

    Positive floats sort like their bits read as integers; of negative ones all bits but the sign are turned.
    """
    bits = (logits + 0.0).view(torch.int32)  # plus 0: there is no -0
    falling = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    low = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return (falling | low).topk(min(count, logits.shape[1])).indices


# -- log-probabilities --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities and ranks of some tokens, [rows] each, and the most likely tokens, [rows, k] each."""

    own: Tensor
    ranks: Tensor
    ids: Tensor
    likely: Tensor

    def read(self, counts: Sequence[int]) -> list[TokenLogprobs]:
        """The rows, each with as many likely tokens as it wants."""
        own, ranks, ids, likely = (part.tolist() for part in (self.own, self.ranks, self.ids, self.likely))
        return [
            TokenLogprobs(
                own[row], tuple(zip(ids[row][:count], likely[row][:count], strict=True)), ranks[row]
            )
            for row, count in enumerate(counts)
        ]


def candidate_logs(logits: Tensor, ids: Tensor) -> Tensor:
    """logits float32 [rows, vocabulary], ids int64 [rows, n], distinct in a row -> float32 [rows, n + 1].

    Log-probabilities of these tokens, and the log of all others' probability.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((logits.gather(1, ids), rest), dim=1) - norm


def score(logits: Tensor, tokens: Tensor, most: int) -> Scores:
    """logits float32 [rows, vocabulary], tokens int64 [rows]; `most`: likely tokens wanted by any row."""
    norm = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, tokens[:, None])
    ranks = 1 + (logits > own).sum(-1)
    ids = top_ids(logits, most) if most else tokens.new_empty((len(tokens), 0))
    return Scores((own - norm)[:, 0], ranks, ids, logits.gather(1, ids) - norm)
