"""Decode steps recorded once and replayed: one launch instead of some hundred a layer.

A recording computes a fixed number of rows in fixed memory. A step with fewer rows is filled up with rows
that are a first token each, whose keys and values go to page 0, which is nobody's.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from server.backends.torch_.attention import Layout
from server.backends.torch_.inputs import Inputs

SIZES = (1, 2, 4, *range(8, 257, 8))
Forward = Callable[[Inputs], Tensor]


class Recording(Protocol):
    """A forward pass that can be run again over what now lies in the memory it was recorded with."""

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], None]], Recording]


class Slate:
    """The memory of a recording's inputs and logits, for the most rows; smaller recordings use a part."""

    def __init__(self, rows: int, pages: int, vocab_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.places = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.keep = torch.arange(rows, device=device)
        self.logits = torch.zeros(rows, vocab_size, dtype=torch.float32, device=device)

    def inputs(self, rows: int) -> Inputs:
        layout = Layout(self.places[:rows], self.tables[:rows], self.lengths[:rows])
        keep = self.keep[:rows]
        return Inputs(self.tokens[:rows], self.positions[:rows], layout, keep, keep)

    def fill(self, inputs: Inputs, size: int) -> None:
        """Copy a step's inputs; rows from its own to `size` become rows that are none."""
        layout, rows = inputs.layout, len(inputs.tokens)
        width = layout.tables.shape[1]
        for ours, theirs in (
            (self.tokens, inputs.tokens),
            (self.positions, inputs.positions),
            (self.places, layout.places),
            (self.lengths, layout.lengths),
        ):
            ours[:rows].copy_(theirs)
            ours[rows:size].fill_(1 if ours is self.lengths else 0)
        self.tables[:rows, :width].copy_(layout.tables)
        self.tables[rows:size, 0].zero_()


class Replays:
    """server.backends.torch_.executor.Replay: a recording for each of some numbers of rows."""

    def __init__(self, slate: Slate, recordings: dict[int, Recording]) -> None:
        self._slate = slate
        self._recordings = recordings
        self._sizes = sorted(recordings)

    def run(self, inputs: Inputs) -> Tensor | None:
        rows = len(inputs.tokens)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None or inputs.layout.chunks or len(inputs.keep) != rows:
            return None
        self._slate.fill(inputs, size)
        self._recordings[size].replay()
        return self._slate.logits[:rows]


def record(
    slate: Slate, forward: Forward, largest: int, recorder: Recorder, progress: Callable[[float], None]
) -> Replays:
    """Recordings for up to `largest` rows, the largest first: the others then fit into its memory."""
    sizes = [size for size in SIZES if size < largest]
    sizes.append(next((size for size in SIZES if size >= largest), SIZES[-1]))
    found: dict[int, Recording] = {}
    for done, size in enumerate(reversed(sizes), start=1):
        inputs, logits = slate.inputs(size), slate.logits[:size]

        def run(inputs: Inputs = inputs, logits: Tensor = logits) -> None:
            logits.copy_(forward(inputs))

        found[size] = recorder(run)
        progress(done / len(sizes))
    return Replays(slate, found)


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Recording:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # what allocates or compiles at its first use does so now
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph
