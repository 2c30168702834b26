"""The sensitivities by which weight-compression toolkits choose layers for 4 bits, for comparison with ours.

They guess from one linear's weights W and inputs X what a search measures through the whole model. Defined as
in NNCF's mixed-precision criteria: the activation metrics are scaled by how well 8 bits hold the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]
TOP = 127  # of symmetric 8-bit codes


def rounded(weight: Array) -> Array:
    """[out, in] in 8 bits, a scale for each row."""
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / TOP, np.finfo(np.float32).tiny)
    found: Array = np.clip(np.round(weight / scale), -TOP - 1, TOP) * scale
    return found


@dataclass(frozen=True, slots=True)
class Errors:
    """What 8 bits do to the weights of a linear."""

    worst: float  # the largest mean squared error of a row
    length: float  # of all errors as one vector

    @classmethod
    def of(cls, weight: Array) -> "Errors":
        off = rounded(weight) - weight
        return cls(float(np.square(off).mean(axis=1).max()), float(np.linalg.norm(off)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sums over tokens of what enters a linear, for each channel."""

    tokens: int
    sums: Sums
    squares: Sums
    magnitudes: Sums

    @classmethod
    def of(cls, inputs: Array) -> "Inputs":
        """[tokens, in]"""
        exact = inputs.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), np.square(exact).sum(axis=0), np.abs(exact).sum(axis=0))

    def __add__(self, other: "Inputs") -> "Inputs":
        return Inputs(
            self.tokens + other.tokens,
            self.sums + other.sums,
            self.squares + other.squares,
            self.magnitudes + other.magnitudes,
        )

    @property
    def variances(self) -> Sums:
        return np.maximum(self.squares / self.tokens - np.square(self.sums / self.tokens), 0.0)


def weight_error(errors: Errors, _: Inputs | None = None) -> float:
    """The inverse of the largest mean squared error of a row: what 8 bits hold best is the most sensitive."""
    return float(1.0 / (errors.worst + np.finfo(np.float32).eps))


def hessian_input_activation(errors: Errors, inputs: Inputs) -> float:
    """The mean diagonal of the layer's Hessian 2 X'X times the length of the weights' 8-bit error."""
    return 2.0 * float((inputs.squares / inputs.tokens).mean()) * errors.length


def mean_activation_variance(errors: Errors, inputs: Inputs) -> float:
    """Over input channels."""
    return float(inputs.variances.mean()) * weight_error(errors)


def max_activation_variance(errors: Errors, inputs: Inputs) -> float:
    return float(inputs.variances.max()) * weight_error(errors)


def mean_activation_magnitude(errors: Errors, inputs: Inputs) -> float:
    return float((inputs.magnitudes / inputs.tokens).mean()) * weight_error(errors)


Metric = Callable[[Errors, Inputs], float]
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "weight_quantization_error": weight_error,
        "hessian_input_activation": hessian_input_activation,
        "mean_activation_variance": mean_activation_variance,
        "max_activation_variance": max_activation_variance,
        "mean_activation_magnitude": mean_activation_magnitude,
    }
)
