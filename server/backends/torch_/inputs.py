"""What a forward pass needs to know, gathered on the host and sent to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.backends.torch_.attention import Chunk, Layout
from server.backends.torch_.kv import PAGE, PageTables
from server.backends.torch_.passes import Span
from server.backends.torch_.transfer import to_device
from server.engine.step import PREVIOUS

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Inputs:
    """One pass on the device."""

    tokens: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    layout: Layout
    keep: Tensor  # int64: tokens whose logits are wanted
    slots: Tensor  # int64: slots of the rows that sample, in order


def gather_inputs(spans: Sequence[Span], tables: PageTables, last: Tensor) -> Inputs:
    """`last` [slots] holds the tokens that the host does not know yet."""
    ends = np.cumsum([span.size for span in spans]).tolist()
    begins = [0, *ends[:-1]]
    tokens = np.concatenate([np.array(s.row.tokens[s.low : s.high], np.int64) for s in spans])
    positions = np.concatenate([np.arange(s.start, s.start + s.size, dtype=np.int64) for s in spans])
    rows = np.repeat([span.row.slot for span in spans], [span.size for span in spans])
    places = tables.table[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    keep = [place for span, begin in zip(spans, begins, strict=True) for place in _kept(span, begin)]
    singles = [span for span in spans if span.size == 1]
    chunks = list(zip(spans, begins, strict=True))[len(singles) :]
    box = Box()
    box.put(tokens, positions, places, np.array(keep, np.int64))
    box.put(np.array([span.row.slot for span in spans if span.samples], np.int64))
    box.put(*_tables(singles, tables))
    box.put(*(tables.pages(span.row.slot)[: _pages(span)].astype(np.int64) for span, _ in chunks))
    ids, where, to, kept, slots, table, lengths, *pages = box.send(last.device)
    layout = Layout(
        places=to,
        tables=(table.view(len(singles), -1) if singles else table.view(0, 0)).int(),
        lengths=lengths.int(),
        chunks=[
            Chunk(begin, begin + span.size, span.start, held)
            for (span, begin), held in zip(chunks, pages, strict=True)
        ],
    )
    return Inputs(_filled_in(ids, tokens, rows, last), where, layout, kept, slots)


def _kept(span: Span, begin: int) -> list[int]:
    return [*range(begin, begin + span.scored), *([begin + span.size - 1] if span.samples else ())]


def _pages(span: Span) -> int:
    return -(-(span.start + span.size) // PAGE)


def _tables(singles: Sequence[Span], tables: PageTables) -> tuple[Ints, Ints]:
    """Page tables of the rows with one token, as wide as the longest of them, and their lengths."""
    if not singles:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    width = max(_pages(span) for span in singles)
    table = tables.table[[span.row.slot for span in singles], :width].astype(np.int64)
    return table.ravel(), np.array([span.start + 1 for span in singles], np.int64)


def _filled_in(ids: Tensor, tokens: Ints, rows: NDArray[np.int64], last: Tensor) -> Tensor:
    """PREVIOUS replaced by what was sampled last in its slot."""
    flying = np.flatnonzero(tokens == PREVIOUS)
    if not len(flying):
        return ids
    where = to_device(torch.from_numpy(np.stack((flying, rows[flying]))), ids.device)
    return ids.index_copy(0, where[0], last[where[1]])


class Box:
    """Arrays that travel together."""

    def __init__(self) -> None:
        self._arrays: list[Ints] = []

    def put(self, *arrays: Ints) -> None:
        self._arrays += arrays

    def send(self, device: torch.device) -> Sequence[Tensor]:
        flat = to_device(torch.from_numpy(np.concatenate(self._arrays)), device)
        return torch.split(flat, [len(array) for array in self._arrays])
