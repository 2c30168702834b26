"""Ranges from batches: the same in any order, and better than the extremes where there are outliers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import numerics
from quant.observers import Extremes, Histogram, LeastDivergence, LeastError, Observer, Percentile
from quant.scheme import Scheme

W8, W4A = Scheme(bits=8, group=None), Scheme(bits=4, group=None, symmetric=False)
MAKERS: dict[str, Callable[[], Observer]] = {
    "extremes": Extremes,
    "percentile": lambda: Percentile(99.0),
    "least error": lambda: LeastError(W4A, steps=30),
    "least divergence": lambda: LeastDivergence(W8),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(observer: Observer, *batches: Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.add(batch)
    low, high = observer.range()
    return low.item(), high.item()


def error(values: Tensor, scheme: Scheme, span: tuple[float, float]) -> float:
    ends = [torch.tensor(end) for end in span]
    scales, zeros = numerics.affine_parameters(values[None], scheme, torch.float32, *ends)
    codes = numerics.nearest(values[None], scales, zeros, scheme)
    return float((numerics.decode(codes, scales, zeros) - values).square().mean())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), cuts=st.integers(1, 300))
def test_order_and_batches_do_not_matter(name: str, order: list[int], cuts: int) -> None:
    batches = [normal(seed, 100) * (seed + 1) for seed in range(6)]
    as_they_come = observed(MAKERS[name](), *batches)
    assert observed(MAKERS[name](), *(batches[each] for each in order)) == as_they_come
    assert observed(MAKERS[name](), *torch.split(torch.cat(batches), cuts)) == as_they_come


def test_extremes_are_exact_and_of_each_channel_on_request() -> None:
    batches = [normal(seed, 2, 5, 7) for seed in range(3)]
    assert observed(Extremes(), *batches) == (
        min(float(batch.min()) for batch in batches),
        max(float(batch.max()) for batch in batches),
    )
    each = Extremes(channels=True)
    for batch in batches:
        each.add(batch)
    low, high = each.range()
    flat = torch.cat([batch.reshape(-1, 7) for batch in batches])
    assert torch.equal(low, flat.amin(0))
    assert torch.equal(high, flat.amax(0))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from((0.0, -0.0, 1e-42, -1e-42)), min_size=1
    )
)
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    histogram = Histogram()
    histogram.add(torch.tensor(values))
    edges = histogram.edges()
    assert bool((edges[1:] >= edges[:-1]).all())
    assert int(histogram.counts.sum()) == len(values)
    for value in values:
        single = Histogram()
        single.add(torch.tensor([value]))
        which = int(single.counts.argmax())
        assert edges[which] <= torch.tensor(value) <= edges[which + 1]


def test_counts_below_a_point_are_those_of_the_values() -> None:
    values = normal(1, 50_000)
    histogram = Histogram()
    histogram.add(values)
    points = torch.tensor([-9.0, -1.5, -0.01, 0.0, 0.3, 2.0, 9.0], dtype=torch.float64)
    truth = torch.stack([(values < point).sum() for point in points]).double()
    assert float((histogram.up_to(points) - truth).abs().max()) <= 60  # of a bin that holds some hundred


@pytest.mark.parametrize("percent", [95.0, 99.9])
def test_percentiles_are_those_of_the_values(percent: float) -> None:
    values = normal(2, 100_000) * 3.0 + 1.0
    low, high = observed(Percentile(percent), values)
    share = 1.0 - percent / 100.0
    assert low == pytest.approx(float(torch.quantile(values, share)), rel=0.01)
    assert high == pytest.approx(float(torch.quantile(values, 1.0 - share)), rel=0.01)
    assert observed(Percentile(100.0), values) == pytest.approx(observed(Extremes(), values), rel=0.01)


@pytest.mark.parametrize("scheme", [Scheme(bits=4, group=None), W4A, W8], ids=str)
def test_the_least_error_is_the_least_of_the_grid(scheme: Scheme) -> None:
    values = normal(3, 4096)
    values[:4] *= 12.0
    span = observed(LeastError(scheme), values)
    low, high = observed(Extremes(), values)
    grid = [
        error(values, scheme, (low * each, high * each)) for each in torch.linspace(1.0, 0.2, 100).tolist()
    ]
    assert error(values, scheme, span) <= min(grid) * 1.01
    assert error(values, scheme, span) < (0.7 if scheme.bits == 4 else 1.0) * grid[0]


def test_divergence_clips_outliers_and_keeps_what_is_spread_evenly() -> None:
    values = normal(4, 200_000)
    values[:5] = 60.0
    low, high = observed(LeastDivergence(W8), values)
    assert 2.5 < high < 20.0
    assert low == pytest.approx(max(-high, float(values.min())))
    even = torch.linspace(-1.0, 1.0, 100_001)
    assert observed(LeastDivergence(W8), even)[1] > 0.9


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("value", [0.0, 2.5, -7.0])
def test_values_that_are_all_equal_have_a_range(name: str, value: float) -> None:
    low, high = observed(MAKERS[name](), torch.full((10,), value))
    assert low == pytest.approx(value, rel=0.85)
    assert high == pytest.approx(value, rel=0.85)
    scales, _ = numerics.affine_parameters(
        torch.full((1, 10), value), W4A, torch.float32, torch.tensor(low), torch.tensor(high)
    )
    assert bool(scales.isfinite().all())
