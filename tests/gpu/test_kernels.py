"""Every kernel against float64 on random shapes, with outputs full of NaN before."""

from collections.abc import Callable, Iterable

import pytest

from benchmarks.gpu import kernel_checks
from benchmarks.gpu.kernel_checks import KINDS, Checked

pytestmark = pytest.mark.gpu
Require = Callable[[Iterable[Checked]], None]


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers(kind: str, require: Require) -> None:
    require(kernel_checks.linears(24, [kind]))


def test_attention_over_pages(require: Require) -> None:
    require(kernel_checks.attentions(40))


def test_norms_gates_and_positions(require: Require) -> None:
    require(kernel_checks.others(8))


def test_a_replayed_graph_gives_the_eager_bits(require: Require) -> None:
    require(kernel_checks.graphs())


def test_linear_layers_in_triton(require: Require) -> None:
    pytest.importorskip("triton")
    require(kernel_checks.triton_linears(12))
