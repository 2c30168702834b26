"""What every method is given and gives back: one decoder block at a time.

The pipeline keeps one block in memory. It hands a method the block with its full-precision weights and the
hidden states that enter it; the method leaves the block holding what the variant will compute (dequantized
weights, folded norms) and returns the codes. The pipeline then runs the block to get the next block's inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from quant.families import Family
from quant.layer import QuantizedLinear
from quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What is to become of one linear. `scheme` is None for formats with one way only (bitsandbytes)."""

    scheme: Scheme | None
    scale_dtype: torch.dtype


class Activations(Protocol):
    """Hidden states that enter a block, read anew on every iteration, always in the same order."""

    def __iter__(self) -> Iterator[Tensor]:
        """[samples, tokens, hidden] in the block's dtype, on its device."""
        ...

    def __len__(self) -> int:
        """Batches."""
        ...


class Block(Protocol):
    """One decoder block of a model that transformers defines."""

    @property
    def name(self) -> str:
        """Where it stands in the checkpoint: "model.layers.3"."""
        ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def family(self) -> Family:
        """Which linears share an input, which norm feeds which linears."""
        ...

    @property
    def linears(self) -> Mapping[str, nn.Linear]:
        """By name below the block ("self_attn.q_proj"), in the order of computation."""
        ...

    def __call__(self, hidden: Tensor) -> Tensor:
        """[samples, tokens, hidden] -> the same shape; causal, positions from 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """How one linear went; becomes an event, and a line of the variant's report."""

    module: str  # full name: "model.layers.3.self_attn.q_proj"
    method: str  # what was kept in the end: "gptq", or "rtn" where it fell back
    loss: float | None = None  # mean squared error of the layer's output on the calibration inputs
    rtn_loss: float | None = None  # the same for round-to-nearest under the same scheme
    damping: float | None = None  # share of the Hessian's mean diagonal that was added (GPTQ)
    fallback: str | None = None  # why the method was not used
    tokens: int | None = None  # of the calibration text that were sent to this expert; None: no expert's


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """The quantized linears by name below the block. Tensors of the block that are not among them (norms,
    biases) are written as the block's module holds them afterwards."""

    layers: Mapping[str, QuantizedLinear]
    records: tuple[LayerRecord, ...] = field(default=())


class Method(Protocol):
    """One algorithm. Stateless between blocks, deterministic on one device and thread count."""

    @property
    def name(self) -> str: ...

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations; if not, none are made."""
        ...

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """`plans`: by name below the block; linears without a plan keep their weights.

        Raises BadSource naming the module for NaN or infinite weights, BuildFailed for such outputs.
        """
        ...
