"""The hidden states between two blocks: [samples, tokens, hidden], in a file or in memory, batch by batch."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quant.files import disk_full_is_typed
from quant.journal import Journal
from quant.tensors import bytes_of, write_all


class Hidden(Protocol):
    """Implements quant.methods.base.Activations. Batches are the same wherever the states are kept."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What all batches of a build share."""

    shape: tuple[int, int, int]  # samples, tokens, hidden
    batch: int  # samples
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def batches(self) -> int:
        return -(-self.shape[0] // self.batch)


class OnDisk:
    """A file of raw numbers, read anew on every iteration, so that one batch is in memory."""

    def __init__(self, file: Path, place: Place) -> None:
        self.file = file
        self._place = place

    def __iter__(self) -> Iterator[Tensor]:
        samples, *rest = self._place.shape
        with self.file.open("rb", buffering=0) as stream:
            for start in range(0, samples, self._place.batch):
                batch = torch.empty((min(self._place.batch, samples - start), *rest), dtype=self._place.dtype)
                _fill(stream, batch)
                yield batch.to(self._place.device)

    def __len__(self) -> int:
        return self._place.batches

    def write(self, batches: Iterable[Tensor]) -> None:
        """Synced when it returns. Raises DiskFull."""
        with disk_full_is_typed(), self.file.open("wb", buffering=0) as stream:
            for batch in batches:
                write_all(stream, bytes_of(batch.to(self._place.dtype)))
            os.fsync(stream.fileno())


def _fill(stream: FileIO, batch: Tensor) -> None:
    left = bytes_of(batch)
    while left:
        count = stream.readinto(left)
        if not count:
            raise OSError("the file of activations is shorter than it was written")
        left = left[count:]


class Chain(Protocol):
    """The inputs of one block after the other."""

    def resume(self) -> int | None:
        """The block whose inputs are there; None where the first one's must be made."""
        ...

    def begin(self, batches: Iterable[Tensor]) -> None:
        """Take the inputs of block 0."""
        ...

    def inputs(self) -> Hidden: ...

    def advance(self, block: Callable[[Tensor], Tensor]) -> None:
        """Replace the inputs of a block by its outputs."""
        ...


class DiskChain:
    """One file for each block's inputs, journalled, so that a killed build goes on with the last."""

    def __init__(self, folder: Path, journal: Journal, place: Place, blocks: int) -> None:
        self._folder = folder
        self._journal = journal
        self._place = place
        self._blocks = blocks
        self._index = 0

    def resume(self) -> int | None:
        found = [n for n in range(self._blocks + 1) if self._journal.has(f"inputs.{n}")]
        self._index = found[-1] if found else 0
        return self._index if found else None

    def begin(self, batches: Iterable[Tensor]) -> None:
        self._folder.mkdir(exist_ok=True)
        self._write(0, batches)
        self._index = 0

    def inputs(self) -> OnDisk:
        return OnDisk(self._file(self._index), self._place)

    def advance(self, block: Callable[[Tensor], Tensor]) -> None:
        old = self.inputs()
        if self._index + 1 < self._blocks:  # nobody reads the last one's
            self._write(self._index + 1, map(block, old))
            self._index += 1
            old.file.unlink()

    def _write(self, index: int, batches: Iterable[Tensor]) -> None:
        OnDisk(self._file(index), self._place).write(batches)
        self._journal.add(f"inputs.{index}", self._file(index))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.bin"


class MemoryChain:
    """For machines with room: nothing is written, and a killed build replays the finished blocks."""

    def __init__(self, place: Place, home: torch.device) -> None:
        self._place = place
        pinned = home.type == "cpu" and place.device.type == "cuda"
        self._states = torch.empty(place.shape, dtype=place.dtype, device=home, pin_memory=pinned)

    def resume(self) -> int | None:
        return None

    def begin(self, batches: Iterable[Tensor]) -> None:
        for number, batch in enumerate(batches):
            self._put(number, batch)

    def inputs(self) -> "InMemory":
        return InMemory(self._states, self._place)

    def advance(self, block: Callable[[Tensor], Tensor]) -> None:
        for number, batch in enumerate(self.inputs()):
            self._put(number, block(batch))

    def _put(self, number: int, batch: Tensor) -> None:
        start = number * self._place.batch
        self._states[start : start + len(batch)].copy_(batch)


class InMemory:
    def __init__(self, states: Tensor, place: Place) -> None:
        self._states = states
        self._place = place

    def __iter__(self) -> Iterator[Tensor]:
        for part in torch.split(self._states, self._place.batch):
            yield part.to(self._place.device, non_blocking=True)

    def __len__(self) -> int:
        return self._place.batches
