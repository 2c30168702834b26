"""The tensors of torch formats beside the source's, for quant.measure.rounding.

Methods that scale channels (AWQ, SmoothQuant) fold the scales into what comes before a linear. What they did
to a matrix is undone first: the scale of each input channel, and of each output channel where another linear
reads it, is fitted by least squares. A zeroed matrix stays at a distance of 1, and scales of groups cannot be
fitted away.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quant.checkpoint import checkpoint_tensors, read_config
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.measure.rounding import ALL_WEIGHTS, FLOATS, LARGEST, Pair, Rows, float_pair, row_step
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

FOLDING = frozenset({"awq", "awq+gptq", "best", "smoothquant"})
READ_BY_LINEARS = ("v_proj", "up_proj")  # whose output channels are scaled, too
ALLOWED: Mapping[str, float] = {
    "gptq": 2.0,
    "awq+gptq": 2.0,
    "best": 2.0,
}  # times: they move weights on purpose
ROUNDS = 4


def torch_pairs(source: Path, variant: Path, method: str) -> Iterator[Pair]:
    """Two checkpoint folders. Raises BadSource."""
    tensors, theirs = checkpoint_tensors(variant), checkpoint_tensors(source)
    modules = quantized_modules(read_config(variant)[0], tensors)
    sampled = sum(one.shape[0] * one.shape[1] for one in modules.values()) > ALL_WEIGHTS
    for name, module in modules.items():
        if f"{name}.weight" not in theirs:
            continue
        own = _read(theirs[f"{name}.weight"]).float().numpy()
        found = _decoded(module)
        if found.shape != own.shape:  # stored the other way round, or several in one
            continue
        if method in FOLDING:
            own = _scaled(own, found, rows=name.endswith(READ_BY_LINEARS))
        step = row_step(len(own), own.size, sampled)
        yield Pair(name, own[::step], found[::step], _rounder(module, ALLOWED.get(method, 1.0)), costly=False)
    if method not in FOLDING:  # which change norms and biases on purpose
        yield from _floats(tensors, theirs)


def _floats(tensors: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> Iterator[Pair]:
    for name, info in tensors.items():
        other = theirs.get(name)
        if other is None or other.shape != info.shape or info.dtype not in FLOATS or info.elements > LARGEST:
            continue
        own, found = (np.atleast_2d(_read(one).float().numpy()) for one in (other, info))
        yield float_pair(name, own.reshape(-1, own.shape[-1]), found.reshape(-1, found.shape[-1]))


def _decoded(module: QuantizedModule) -> Rows:
    parts = {suffix: _read(info) for suffix, info in module.tensors.items()}
    found: Rows = module.unpack(parts).dequantize().float().numpy()
    return found


def _read(info: TensorInfo) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(info.file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(info.name)
    return tensor


def _scaled(own: Rows, found: Rows, *, rows: bool) -> Rows:
    """The source's matrix with the channel scales that bring it nearest to the variant's."""
    r, c = np.ones((len(own), 1), np.float32), np.ones((1, own.shape[1]), np.float32)
    for _ in range(ROUNDS if rows else 1):
        c = _fit(own * r, found, axis=0)
        if rows:
            r = _fit(own * c, found, axis=1)
    scaled = np.asarray(own * r * c, np.float32)
    lost = np.square(scaled).sum() < 1e-3 * np.square(own).sum()
    return own if lost else scaled


def _fit(own: Rows, found: Rows, axis: int) -> Rows:
    over = np.maximum(np.square(own).sum(axis=axis, keepdims=True), 1e-30)
    return np.asarray((own * found).sum(axis=axis, keepdims=True) / over, np.float32)


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
