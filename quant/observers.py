"""Which range codes shall span, from values that come in batches.

Every observer keeps extremes or counts and nothing else, so that the range is the same, to the last bit, in
whatever order and batches the values came. All are of one tensor but `Extremes`, which can be per channel.
`low` and `high` go to `numerics.affine_parameters`.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quant.numerics import affine_parameters, decode, nearest
from quant.scheme import Scheme

_BINS = 1 << 16
_SIGN = 0x8000
_KL_BINS = 2048
_KL_STEP = 8


class Observer(Protocol):
    def add(self, values: Tensor) -> None:
        """Finite values of any shape, on any device."""
        ...

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), float32; of at least one value."""
        ...


class Extremes:
    """The least and the greatest value; with `channels` those of each entry of the last dimension."""

    def __init__(self, *, channels: bool = False) -> None:
        self._channels = channels
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, values: Tensor) -> None:
        if not values.numel():
            return
        flat = values.reshape(-1, values.shape[-1]) if self._channels else values.reshape(-1, 1)
        low, high = flat.float().aminmax(dim=0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._low is not None
        assert self._high is not None
        return (self._low, self._high) if self._channels else (self._low[0], self._high[0])


class Histogram:
    """Counts of values by their first 16 bits as float32: 128 bins for each power of two, of either sign.

    The bins are there before any value is, which is what makes counts independent of order.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self._extremes = Extremes()

    def add(self, values: Tensor) -> None:
        self._extremes.add(values)
        first = (values.float().contiguous().view(torch.int32) >> 16) & 0xFFFF
        keys = torch.where(first >= _SIGN, 0xFFFF - first, first + _SIGN)  # ascending like the values
        self.counts += torch.bincount(keys.flatten(), minlength=_BINS).cpu()

    def extremes(self) -> tuple[float, float]:
        low, high = self._extremes.range()
        return low.item(), high.item()

    def edges(self) -> Tensor:
        """float64 [bins + 1], ascending; the outermost bins are of infinities and hold nothing."""
        magnitude = (torch.arange(_SIGN + 1, dtype=torch.int64) << 16).clamp(max=0x7F800000)
        positive = magnitude.to(torch.int32).view(torch.float32).double()
        return torch.cat([-positive.flip(0), positive[1:]])

    def filled(self) -> tuple[Tensor, Tensor]:
        """(middles as float32, counts) of the bins that hold something; no middle is beyond the extremes."""
        low, high = self.extremes()
        edges = self.edges().clamp(low, high)
        which = self.counts.nonzero().flatten()
        return ((edges[which] + edges[which + 1]) / 2.0).float(), self.counts[which]

    def up_to(self, points: Tensor) -> Tensor:
        """How many values are below each point, float64; those of a bin count as spread over it evenly."""
        low, high = self.extremes()
        edges = self.edges()
        which = (torch.searchsorted(edges, points, right=True) - 1).clamp(0, _BINS - 1)
        left, right = edges[which].clamp(low, high), edges[which + 1].clamp(low, high)
        share = ((points - left) / (right - left).clamp(min=1e-300)).clamp(0.0, 1.0)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        return before[which].double() + share * self.counts[which].double()


@dataclass(frozen=True, slots=True)
class Percentile:
    """Leaves the same share of values outside at either end: 99.9 leaves one in a thousand each."""

    percent: float = 99.9
    histogram: Histogram = field(default_factory=Histogram)

    def add(self, values: Tensor) -> None:
        self.histogram.add(values)

    def range(self) -> tuple[Tensor, Tensor]:
        middles, counts = self.histogram.filled()
        share = counts.cumsum(0).double() / int(counts.sum())
        outside = 1.0 - self.percent / 100.0
        ends = torch.tensor([outside, 1.0 - outside], dtype=torch.float64)
        low, high = middles[torch.searchsorted(share, ends).clamp(max=len(middles) - 1)]
        return low, high


@dataclass(frozen=True, slots=True)
class LeastError:
    """The extremes shrunk by the factor of a grid that gives the least squared error of rounding."""

    scheme: Scheme
    steps: int = 100
    least: float = 0.2
    histogram: Histogram = field(default_factory=Histogram)

    def add(self, values: Tensor) -> None:
        self.histogram.add(values)

    def range(self) -> tuple[Tensor, Tensor]:
        values, counts = self.histogram.filled()
        low, high = (torch.tensor(end) for end in self.histogram.extremes())
        factors = torch.linspace(1.0, self.least, self.steps)
        errors = torch.stack([self._error(values, counts, low * each, high * each) for each in factors])
        best = factors[errors.argmin()]  # of equals the first: the widest
        return low * best, high * best

    def _error(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
        row = values[None]
        scales, zeros = affine_parameters(row, _whole(self.scheme), torch.float32, low, high)
        codes = nearest(row, scales, zeros, self.scheme)
        return ((decode(codes, scales, zeros) - row).double().square() * counts).sum()


@dataclass(frozen=True, slots=True)
class LeastDivergence:
    """Clips where the distribution of the rounded magnitudes diverges least from that of the clipped ones.

    S. Migacz, "8-bit Inference with TensorRT" (2017), with as many levels as the scheme has on one side.
    """

    scheme: Scheme
    histogram: Histogram = field(default_factory=Histogram)

    def add(self, values: Tensor) -> None:
        self.histogram.add(values)

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.extremes()
        reach = max(-low, high)
        mass = self._magnitudes(reach)
        ends = torch.arange(min(max(self.scheme.middle, _KL_STEP), _KL_BINS), _KL_BINS + 1, _KL_STEP)
        apart = torch.stack([_divergence(mass, int(end), self.scheme.middle) for end in ends])
        limit = reach * int(ends[apart.argmin()]) / _KL_BINS
        return torch.tensor(max(low, -limit)), torch.tensor(min(high, limit))

    def _magnitudes(self, reach: float) -> Tensor:
        """Values in bins of equal width from 0 to `reach`, float64."""
        edges = torch.linspace(0.0, reach, _KL_BINS + 1, dtype=torch.float64)
        below, above = self.histogram.up_to(-edges), self.histogram.up_to(edges)
        within = above - below
        within[0] = 0.0  # zeros too are in the first bin
        within[-1] = float(self.histogram.counts.sum())
        return within.diff().clamp(min=0.0)


def _whole(scheme: Scheme) -> Scheme:
    return Scheme(bits=scheme.bits, group=None, symmetric=scheme.symmetric)


def _divergence(mass: Tensor, end: int, levels: int) -> Tensor:
    """KL of the first `end` bins with the rest in the last one, from the same bins merged into levels."""
    inside = mass[:end]
    clipped = inside.clone()
    clipped[-1] += mass[end:].sum()
    level = torch.arange(end) * levels // end
    filled = (inside > 0.0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    merged = filled * (sums / bins.clamp(min=1.0))[level]
    p = clipped / clipped.sum()
    q = (merged / merged.sum().clamp(min=1e-300)).clamp(min=1e-12)
    return torch.where(p > 0.0, p * (p / q).log(), 0.0).sum()
