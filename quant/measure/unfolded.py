"""The tensors of torch formats beside the source's, for quant.measure.rounding.

Methods that scale channels (AWQ, SmoothQuant) fold the scales into what comes before a linear. What they did
to a matrix is done to the source's first, as far as other tensors of the variant bear it out
(quant.measure.folds). A zeroed matrix stays at a distance of 1, and scales of groups cannot be fitted away.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quant.checkpoint import checkpoint_tensors, read_config
from quant.families import family_of
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.measure.folds import (
    Columns,
    Doubles,
    Fold,
    column_scales,
    folds_of,
    norm_scales,
    row_scales,
    scaled,
)
from quant.measure.rounding import ALL_WEIGHTS, FLOATS, Pair, Rows, float_pair, row_step
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

FOLDING = frozenset({"awq", "awq+gptq", "best", "smoothquant"})
ALLOWED: Mapping[str, float] = {
    "gptq": 2.0,
    "awq+gptq": 2.0,
    "best": 2.0,
}  # times: they move weights on purpose


def torch_pairs(source: Path, variant: Path, method: str) -> Iterator[Pair]:
    """Two checkpoint folders. Raises BadSource."""
    sides = _sides(source, variant)
    folded = _Folded.of(variant, sides) if method in FOLDING else None
    channels: dict[Fold, Columns] = {}
    for name, module in sides.modules.items():
        if not sides.can_be_compared(name):  # stored the other way round, or several in one
            continue
        own, found = sides.both(name)
        if folded:
            own = folded.source(name, own, found)
        step = row_step(len(own), own.size, sides.sampled)
        pair = Pair(
            name, own[::step], found[::step], _rounder(module, ALLOWED.get(method, 1.0)), costly=False
        )
        yield pair
        if folded and (fold := folded.behind.get(name)):
            channels.setdefault(fold, Columns()).add(pair.source, pair.variant, _rounder(module, 1.0))
    for fold, columns in channels.items():
        yield columns.pair(fold)
    yield from _floats(sides, folded.norms if folded else frozenset())


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both checkpoints."""

    theirs: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, QuantizedModule]
    sampled: bool

    def can_be_compared(self, name: str) -> bool:
        other = self.theirs.get(f"{name}.weight")
        return name in self.modules and other is not None and other.shape == self.modules[name].shape

    def both(self, name: str) -> tuple[Rows, Rows]:
        return _read(self.theirs[f"{name}.weight"]).float().numpy(), _decoded(self.modules[name])


def _sides(source: Path, variant: Path) -> _Sides:
    tensors = checkpoint_tensors(variant)
    modules = quantized_modules(read_config(variant)[0], tensors)
    sampled = sum(one.shape[0] * one.shape[1] for one in modules.values()) > ALL_WEIGHTS
    return _Sides(checkpoint_tensors(source), tensors, modules, sampled)


@dataclass(frozen=True, slots=True)
class _Folded:
    """A variant whose scales are read from its norms and matrices."""

    sides: _Sides
    behind: Mapping[str, Fold]  # by linear: the fold that its columns took
    before: Mapping[str, Fold]  # by linear: the fold that its rows gave
    heads: int
    offset: float  # of norms

    @classmethod
    def of(cls, variant: Path, sides: _Sides) -> "_Folded":
        config, architecture = read_config(variant)
        family, blocks = family_of(architecture), int(config["num_hidden_layers"])
        both = sides.theirs.keys() & sides.tensors.keys()
        folds = list(folds_of(family, blocks, sides.can_be_compared, both.__contains__))
        return cls(
            sides=sides,
            behind={name: fold for fold in folds for name in fold.linears},
            before={fold.source: fold for fold in folds if not fold.is_norm},
            heads=int(config["num_attention_heads"]),
            offset=family.norm_offset,
        )

    @property
    def norms(self) -> frozenset[str]:
        """Tensors that are not the source's, on purpose."""
        return frozenset(f"{fold.source}.weight" for fold in self.behind.values() if fold.is_norm)

    def source(self, name: str, own: Rows, found: Rows) -> Rows:
        """The source's matrix, scaled as the variant's other tensors say that it was."""
        if fold := self.behind.get(name):
            own = scaled(own, None, self._columns(fold, own, found))
        return scaled(own, self._rows(name, own, found), None) if name in self.before else own

    def _columns(self, fold: Fold, own: Rows, found: Rows) -> Doubles:
        """What the fold's linears were multiplied by."""
        if fold.is_norm:
            name = f"{fold.source}.weight"
            theirs, ours = (
                _read(one[name]).float().numpy() for one in (self.sides.theirs, self.sides.tensors)
            )
            return norm_scales(theirs, ours, self.offset)
        before, given = self.sides.both(fold.source)
        if behind := self.behind.get(fold.source):
            before = scaled(before, None, self._columns(behind, before, given))
        return column_scales(self._rows(fold.source, before, given), own, found, self._heads(fold))

    def _rows(self, name: str, own: Rows, found: Rows) -> Doubles:
        return row_scales(own, found, _rounder(self.sides.modules[name], 1.0))

    def _heads(self, fold: Fold) -> int:
        return self.heads if fold.per_head else 1


def _floats(sides: _Sides, folded: frozenset[str]) -> Iterator[Pair]:
    for name, info in sides.tensors.items():
        other = sides.theirs.get(name)
        if name in folded or other is None or other.shape != info.shape:
            continue
        if info.dtype in FLOATS:
            step = row_step(info.shape[0], info.elements, sides.sampled) if len(info.shape) > 1 else 1
            own, found = (np.atleast_2d(_read(one, step).float().numpy()) for one in (other, info))
            yield float_pair(name, own.reshape(-1, own.shape[-1]), found.reshape(-1, found.shape[-1]))


def _decoded(module: QuantizedModule) -> Rows:
    parts = {suffix: _read(info) for suffix, info in module.tensors.items()}
    found: Rows = module.unpack(parts).dequantize().float().numpy()
    return found


def _read(info: TensorInfo, step: int = 1) -> torch.Tensor:
    """Every `step`th row; the others are not read."""
    import torch
    from safetensors import safe_open

    with safe_open(info.file, "pt") as file:
        if step > 1:
            rows = file.get_slice(info.name)
            return torch.cat([rows[at : at + 1] for at in range(0, info.shape[0], step)])
        tensor: torch.Tensor = file.get_tensor(info.name)
    return tensor


def _rounder(module: QuantizedModule, allowed: float) -> Callable[[Rows], Rows]:
    """Round-to-nearest at the module's scheme, its error stretched by what the method is allowed."""
    bits, group, symmetric = _scheme(module.scheme, module.format.name)

    def again(rows: Rows) -> Rows:
        width = group if group and rows.shape[1] % group == 0 else rows.shape[1]
        parts = rows.reshape(len(rows), -1, width)
        rounded = _symmetric(parts, bits) if symmetric else _asymmetric(parts, bits)
        stretched: Rows = rows + np.float32(allowed**0.5) * (rounded.reshape(rows.shape) - rows)
        return stretched

    return again


def _scheme(scheme: Scheme | None, form: str) -> tuple[int, int | None, bool]:
    if scheme is not None:
        return scheme.bits, scheme.group, scheme.symmetric
    return (4, 64, True) if form == "bnb4" else (8, None, True)


def _symmetric(parts: Any, bits: int) -> Any:
    top = 2 ** (bits - 1)
    step = np.maximum(np.abs(parts).max(axis=-1, keepdims=True) / (top - 0.5), 1e-12)
    return np.clip(np.round(parts / step), -top, top - 1) * step


def _asymmetric(parts: Any, bits: int) -> Any:
    low, high = np.minimum(parts.min(-1, keepdims=True), 0), np.maximum(parts.max(-1, keepdims=True), 0)
    step = np.maximum((high - low) / (2**bits - 1), 1e-12)
    return np.round((parts - low) / step) * step + low
