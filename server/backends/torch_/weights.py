"""Tensors of a checkpoint's safetensors files, one file mapped at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource
from quant.safetensors_header import TensorInfo
from server.errors import OpenError


class Weights:
    """Reads tensors by name and knows which were never asked for. Not to be shared by threads.

    A tensor lies in the mapped file: it must be copied before the next one of another file is read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OpenError."""
        try:
            self._where = checkpoint_tensors(folder)
        except BadSource as error:
            raise OpenError(str(error)) from None
        self.unread = set(self._where)
        self._file: Path | None = None
        self._open: Any = None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        return self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises OpenError."""
        if name not in self._where:
            raise OpenError(f"the checkpoint lacks tensor {name}")
        return self._where[name].shape

    def read(self, name: str) -> Tensor:
        """Raises OpenError."""
        self.shape(name)
        file = self._where[name].file
        if file != self._file:
            self.close()
            self._open, self._file = safe_open(file, framework="pt", device="cpu"), file
        self.unread.discard(name)
        tensor: Tensor = self._open.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._open = self._file = None
