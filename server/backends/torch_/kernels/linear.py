"""y = x weight^T for packed weights, on any device.

CUDA: our kernel (cuda/linear.cu) up to `LARGEST_BATCH` rows, beyond it the weight is dequantized and the
library multiplies. Where the kernel cannot be compiled: Triton, if it is there. CPU: torch, the same numbers.
Every path on CUDA can be captured in a graph: no host synchronisation, launches that depend on shapes alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.backends.torch_.kernels import activations, direct, driver
from server.backends.torch_.kernels.compile import CannotCompile
from server.backends.torch_.kernels.direct import defines
from server.backends.torch_.kernels.packed import Packed

LARGEST_BATCH = 128
THREADS = 256
WARPS = 8
PARTIAL_BYTES = 64 * 2**20  # sums of blocks that share rows
COUNTERS = 1 << 16
PIECE = 1 << 18  # weights that are dequantized at once where torch multiplies

FILES = ("ptx", "decode", "linear")
HALVES = (torch.float16, torch.bfloat16)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x [..., columns] float16, bfloat16 or float32 -> [..., rows] in that dtype, or float32 if `wide`."""
    rows, columns = packed.shape
    flat = x.reshape(-1, columns)
    if packed.threshold is not None:
        flat = activations.round_rows(flat, packed.threshold)
    return _choose(flat, packed)(flat.contiguous(), packed, bias, wide).view(*x.shape[:-1], rows)


Way = Callable[[Tensor, Packed, Tensor | None, bool], Tensor]


def _choose(x: Tensor, packed: Packed) -> Way:
    if x.device.type != "cuda" or x.dtype not in HALVES:
        return reference
    if not compiled(x.device):
        return _triton() or reference
    return small if x.shape[0] <= LARGEST_BATCH else large


@cache
def compiled(device: torch.device) -> bool:
    """Whether this device runs the CUDA C++ kernels; the first call compiles one of them."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        activations.module(device, torch.float16)
    except (CannotCompile, driver.CudaError, OSError):
        return False
    return True


def _triton() -> Way | None:
    try:
        from server.backends.torch_.kernels import triton_linear
    except ImportError:
        return None
    return triton_linear.linear


def reference(x: Tensor, packed: Packed, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """Dequantized to x's dtype, some rows at a time, then torch. `wide` changes the result's dtype alone."""
    parts, place = list[Tensor](), 0
    for piece in packed.pieces(PIECE):
        end = place + piece.shape[0]
        some = None if bias is None else bias[place:end]
        parts.append(functional.linear(x, piece.dequantize().to(x.dtype), some))
        place = end
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out.float() if wide else out


def module(packed: Packed, x: Tensor) -> driver.Module:
    return driver.load(x.device, FILES, tuple(defines(packed, x.dtype).items()))


def small(x: Tensor, packed: Packed, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """Our kernels."""
    kind = torch.float32 if wide else x.dtype
    y = torch.empty(x.shape[0], packed.shape[0], dtype=kind, device=x.device)
    if x.shape[0]:
        launch_chosen(x, packed, bias, y, chosen(packed, x.shape[0], described(x.device)))
    return y


def chosen(packed: Packed, batch: int, device: "Device") -> "Plan | direct.Cut":
    return direct.cut(packed, batch, device.processors) or plan(packed, batch, device)


def launch_chosen(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, cut: "Plan | direct.Cut"
) -> None:
    if isinstance(cut, direct.Cut):
        direct.launch(direct.module(packed, x), x, packed, bias, y, cut)
    else:
        launch(module(packed, x), x, packed, bias, y, cut)


@dataclass(frozen=True, slots=True)
class Device:
    processors: int
    shared_bytes: int  # that one block may have


@cache
def described(device: torch.device) -> Device:
    found: Any = torch.cuda.get_device_properties(device)  # its type leaves some attributes out
    return Device(found.multi_processor_count, found.shared_memory_per_block_optin)


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch: tiles of 8 rows of x, warps along the weight's rows, tiles of 16 rows a warp, splits."""

    tiles: int
    row_warps: int
    height: int
    splits: int

    @property
    def rows(self) -> int:
        """Of the weight, for a block."""
        return 16 * self.height * self.row_warps

    def grid(self, rows: int, batch: int) -> tuple[int, int, int]:
        return -(-rows // self.rows), self.splits, -(-batch // (8 * self.tiles))

    def shared_bytes(self, bits: int, scales: int) -> int:
        """As struct Stage and the sums in cuda/linear.cu have it."""
        depth = WARPS // self.row_warps
        weights = WARPS * self.height * (2 * bits * 128 + scales * 64)
        stage = weights + depth * 2 * 8 * self.tiles * 128
        return max((4 if self.height == 1 else 3) * stage, depth * 8 * self.tiles * (self.rows + 4) * 4)

    def partial_bytes(self, rows: int, batch: int) -> int:
        blocks, splits, layers = self.grid(rows, batch)
        return blocks * splits * layers * self.rows * 8 * self.tiles * 4


CUTS = {
    1: ((1, 2, 1), (1, 4, 1)),
    2: ((2, 4, 1), (2, 4, 1)),
    4: ((4, 4, 2), (4, 8, 1)),
    8: ((8, 4, 2), (8, 8, 2)),
}
"""For each number of tiles: row warps and height where blocks are few, and where they are many."""
TALL = 1.7  # what a block of the last kind costs more than one before it
COLUMNS_TO_SPLIT = 1024  # fewest for each of the blocks that share rows


def plan(packed: Packed, batch: int, device: Device) -> Plan:
    """The cut that fills the processors best, as measured on an H100; few blocks share columns."""
    few, many = _cuts(packed, batch, device.shared_bytes)
    rows, columns = packed.shape
    blocks, waves = _filled(few, rows, batch, device)
    if waves > (TALL if many.tiles == 8 else 1.0) * _filled(many, rows, batch, device)[1]:
        return many
    fewest = COLUMNS_TO_SPLIT if few.tiles > 2 else 4 * COLUMNS_TO_SPLIT
    splits = max(1, min(device.processors // blocks, columns // fewest))
    while few.partial_bytes(rows, batch) * splits > PARTIAL_BYTES:
        splits -= 1
    return replace(few, splits=splits)


def _filled(plan: Plan, rows: int, batch: int, device: Device) -> tuple[int, int]:
    """Blocks, and how often they fill the processors."""
    blocks, _, layers = plan.grid(rows, batch)
    return blocks * layers, -(-blocks * layers // device.processors)


def _cuts(packed: Packed, batch: int, shared_bytes: int) -> tuple[Plan, Plan]:
    """The two cuts of the smallest tile that holds the batch, among those that the device can hold."""
    wanted = next((tiles for tiles in CUTS if 8 * tiles >= batch), max(CUTS))
    for tiles in sorted((tiles for tiles in CUTS if tiles <= wanted), reverse=True):
        plans = [Plan(*cut, splits=1) for cut in CUTS[tiles]]
        held = [item for item in plans if item.shared_bytes(packed.bits, packed.span_scales) <= shared_bytes]
        if held:
            return held[0], held[-1]
    raise AssertionError("the smallest block fits every device of compute capability 8.0 and up")


def launch(
    kernels: driver.Module, x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, chosen: Plan
) -> None:
    rows, columns = packed.shape
    partial, counters = workspace(x.device)
    sizes = (x.shape[0], rows, columns, packed.chunks, packed.groups, packed.shift, int(y.dtype != x.dtype))
    tensors = (x, packed.words, packed.scales, packed.book, bias, y, partial, counters)
    shared = chosen.shared_bytes(packed.bits, packed.span_scales)
    name = f"linear_{chosen.tiles}_{chosen.row_warps}_{chosen.height}"
    grid = chosen.grid(rows, x.shape[0])
    overlap = packed.book is None  # codebooks are bound by their look-ups, which uneven blocks slow down
    kernels.launch(name, grid, THREADS, (*tensors, *sizes), shared, overlap=overlap)


def large(x: Tensor, packed: Packed, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    weight = dequantized(x, packed)
    return wide_product(x, weight, bias) if wide else functional.linear(x, weight, bias)


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 x weight^T of halves on a GPU: the library's sums as they are."""
    out = torch.mm(x, weight.T, out_dtype=torch.float32)
    return out if bias is None else out.add_(bias)


def dequantized(x: Tensor, packed: Packed) -> Tensor:
    """The weight in x's dtype, from our kernel."""
    weight = torch.empty(packed.shape, dtype=x.dtype, device=x.device)
    launch_dequantize(module(packed, x), packed, weight)
    return weight


def launch_dequantize(kernels: driver.Module, packed: Packed, weight: Tensor) -> None:
    sizes = (*packed.shape, packed.chunks, packed.groups, packed.shift)
    grid = (-(-packed.chunks // WARPS), packed.words.shape[0], 1)
    tensors = (packed.words, packed.scales, packed.book, weight)
    kernels.launch("dequantize", grid, THREADS, (*tensors, *sizes))


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of blocks, and how many have arrived (zero between launches). For one stream at a time."""
    return (
        torch.empty(PARTIAL_BYTES // 4, dtype=torch.float32, device=device),
        torch.zeros(COUNTERS, dtype=torch.int32, device=device),
    )
