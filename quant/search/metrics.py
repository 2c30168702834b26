"""The sensitivities by which weight-compression toolkits choose layers for 4 bits, for comparison with ours.

They guess from one linear's weights W and inputs X what a search measures through the whole model. Defined as
in NNCF's mixed-precision criteria: the activation metrics are scaled by how well 8 bits hold the weights.
`lowest` is its `ratio`: so large a share of the weights goes to 4 bits, the least sensitive first.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
TOP = 127  # of symmetric 8-bit codes


def rounded(weight: Array) -> Array:
    """[out, in] in 8 bits, a scale for each row."""
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / TOP, np.finfo(np.float32).tiny)
    found: Array = np.clip(np.round(weight / scale), -TOP - 1, TOP) * scale
    return found


def weight_error(weight: Array, _: Array | None = None) -> float:
    """The inverse of the largest mean squared error of a row: what 8 bits hold best is the most sensitive."""
    errors = np.square(rounded(weight) - weight).mean(axis=1)
    return float(1.0 / (errors.max() + np.finfo(np.float32).eps))


def hessian_input_activation(weight: Array, inputs: Array) -> float:
    """The mean diagonal of the layer's Hessian 2 X'X times the length of the weights' 8-bit error."""
    trace = 2.0 * float(np.square(inputs).mean())
    return trace * float(np.linalg.norm(rounded(weight) - weight))


def mean_activation_variance(weight: Array, inputs: Array) -> float:
    """Over input channels."""
    return float(inputs.var(axis=0).mean()) * weight_error(weight)


def max_activation_variance(weight: Array, inputs: Array) -> float:
    return float(inputs.var(axis=0).max()) * weight_error(weight)


def mean_activation_magnitude(weight: Array, inputs: Array) -> float:
    return float(np.abs(inputs).mean()) * weight_error(weight)


Metric = Callable[[Array, Array], float]  # weight [out, in], inputs [tokens, in]
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "weight_quantization_error": weight_error,
        "hessian_input_activation": hessian_input_activation,
        "mean_activation_variance": mean_activation_variance,
        "max_activation_variance": max_activation_variance,
        "mean_activation_magnitude": mean_activation_magnitude,
    }
)


def lowest(sensitivities: Mapping[str, float], weights: Mapping[str, int], ratio: float) -> frozenset[str]:
    """The layers for 4 bits: the least sensitive ones that hold `ratio` of all weights at most."""
    room = ratio * sum(weights.values())
    found = set()
    for name in sorted(sensitivities, key=lambda one: (sensitivities[one], one)):
        room -= weights[name]
        if room < -1e-9:
            break
        found.add(name)
    return frozenset(found)
