"""What `python -m benchmarks.gpu.check` checks, as tests: `pytest -m gpu`. Elsewhere they are skipped."""

from collections.abc import Callable, Iterable

import pytest
import torch

from benchmarks.gpu import kernel_checks
from benchmarks.gpu.kernel_checks import Checked

SEED = 20_000


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that our kernels are compiled for; exact float32; the same random shapes in each run."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device that torch can use")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} is older than compute capability 8.0")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    kernel_checks.seed(SEED + len(request.node.name))


@pytest.fixture
def require() -> Callable[[Iterable[Checked]], None]:
    """Some checks, all of them fine; the worst of those that are not is told first."""

    def check(results: Iterable[Checked]) -> None:
        checked = list(results)
        assert checked
        wrong = sorted((item for item in checked if not item.fine), key=lambda item: -item.error / item.limit)
        assert not wrong, [f"{item.name}: {item.error:.3g}, limit {item.limit:g}" for item in wrong[:12]]

    return check
