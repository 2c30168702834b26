"""Toolkits' sensitivities: by hand, and what they must and must not depend on."""

import numpy as np
import pytest

from quant.search.compared import lowest
from quant.search.metrics import METRICS, Errors, Inputs, rounded, weight_error

DICE = np.random.default_rng(0)
WEIGHT = DICE.standard_normal((8, 16)).astype(np.float32)
INPUTS = DICE.standard_normal((32, 16)).astype(np.float32)
ERRORS = Errors.of(WEIGHT)


def test_by_hand() -> None:
    weight = np.array([[127.0, 0.4], [254.0, 2.0]], np.float32)  # errors .4 and 0 of the second column
    inputs = np.array([[1.0, 0.0], [3.0, 0.0]], np.float32)
    assert np.array_equal(rounded(weight), [[127.0, 0.0], [254.0, 2.0]])
    inverse = 1 / (0.4**2 / 2)
    found = {name: metric(Errors.of(weight), Inputs.of(inputs)) for name, metric in METRICS.items()}
    assert found == pytest.approx(
        {
            "weight_quantization_error": inverse,
            "hessian_input_activation": 2 * (1 + 9) / 4 * 0.4,
            "mean_activation_variance": 0.5 * inverse,
            "max_activation_variance": 1.0 * inverse,
            "mean_activation_magnitude": 1.0 * inverse,
        },
        rel=1e-4,
    )


def test_larger_inputs_are_more_sensitive_and_the_weights_alone_do_not_see_them() -> None:
    for name, metric in METRICS.items():
        small, large = metric(ERRORS, Inputs.of(INPUTS)), metric(ERRORS, Inputs.of(3 * INPUTS))
        assert (large == small) if name == "weight_quantization_error" else (large > 2 * small)


def test_a_constant_input_has_no_variance() -> None:
    constant = Inputs.of(np.ones_like(INPUTS))
    assert METRICS["mean_activation_variance"](ERRORS, constant) == 0
    assert METRICS["mean_activation_magnitude"](ERRORS, constant) == pytest.approx(weight_error(ERRORS))


def test_texts_add_up() -> None:
    whole, parts = Inputs.of(INPUTS), Inputs.of(INPUTS[:5]) + Inputs.of(INPUTS[5:])
    assert parts.variances == pytest.approx(INPUTS.var(axis=0), rel=1e-5)
    for metric in METRICS.values():
        assert metric(ERRORS, parts) == pytest.approx(metric(ERRORS, whole))


def test_zeros_are_no_division_by_zero() -> None:
    zeros = Errors.of(np.zeros_like(WEIGHT))
    assert all(np.isfinite(metric(zeros, Inputs.of(INPUTS))) for metric in METRICS.values())


def test_the_least_sensitive_go_first_up_to_the_ratio() -> None:
    sensitivities = {"a": 3.0, "b": 1.0, "c": 2.0}
    weights = {"a": 50, "b": 30, "c": 20}
    assert lowest(sensitivities, weights, 0.0) == frozenset()
    assert lowest(sensitivities, weights, 0.3) == {"b"}
    assert lowest(sensitivities, weights, 0.6) == {"b", "c"}
    assert lowest(sensitivities, weights, 1.0) == {"a", "b", "c"}
