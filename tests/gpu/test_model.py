"""tiny-chat on a GPU: every format against the CPU in float32, graphs against eager steps, 64 requests."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from benchmarks.gpu import checkpoints, engine, model_checks
from benchmarks.gpu.kernel_checks import Checked

pytestmark = pytest.mark.gpu
Require = Callable[[Iterable[Checked]], None]


@pytest.mark.parametrize("name", checkpoints.WEIGHT_ONLY)
def test_logprobs_are_the_cpus(name: str, require: Require) -> None:
    require(model_checks.formats([name]))


def test_graphs_and_eager_steps_agree(require: Require) -> None:
    require(model_checks.graphs_and_eager())


def test_random_requests_at_once_are_what_each_is_alone(require: Require) -> None:
    require(model_checks.stress())


@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_8_bit_activations_answer(name: str, tmp_path: Path) -> None:
    """Their roundings fall either way, so that texts differ from the CPU's; but the answers are sane."""
    folder = checkpoints.quantized(tmp_path, model_checks.SOURCE, checkpoints.KINDS[name])
    executor = engine.opened(folder, 512, 8, device="cuda", dtype="f16")
    answers = engine.serve(executor, [engine.greedy("a", model_checks.texts()[0], 24, 0)])
    executor.close()
    assert not answers["a"].error
    assert sum(score.logprob for score in answers["a"].logprobs) / 24 > -2.0
