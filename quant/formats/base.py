"""A format is a pair of inverse functions between a plain layer and the tensors of a file."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.layer import QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme

Tensors = Mapping[str, Tensor]  # by what follows the module's name: "qweight", "weight.absmax"


class Format(Protocol):
    """One file format. Stateless; module-level instances are what the registry names."""

    @property
    def name(self) -> str: ...

    @property
    def marker(self) -> str:
        """The tensor that every quantized module has: "qweight"."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensors that a quantized module may have; `bias` is none of them."""
        ...

    def refuse(self, shape: tuple[int, int], scheme: Scheme | None) -> str | None:
        """Why a [out, in] layer cannot be written so, in one line; None where it can."""
        ...

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        """What scales are stored as. Methods round scales to it before they choose codes."""
        ...

    def pack(self, layer: QuantizedLinear) -> dict[str, Tensor]:
        """Contiguous tensors for the file, exactly; `unpack` gives the layer back bit for bit.

        The layer is one that `refuse` has nothing against, with scales in `scale_dtype`.
        """
        ...

    def unpack(self, tensors: Tensors, shape: tuple[int, int], scheme: Scheme | None) -> QuantizedLinear:
        """Raises BadSource for tensors that are missing or have another shape or dtype than promised."""
        ...

    def config(
        self,
        layers: Mapping[str, Scheme | None],
        kept: tuple[str, ...],
        sample: QuantizedLinear | None = None,
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json for these modules and those kept as they were.

        `sample` is any one of the layers: for formats without schemes (bitsandbytes) it tells what there is
        to tell. Raises BadRecipe for schemes that one file cannot mix.
        """
        ...

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` is of this format; `schemes` may still find it unsupported."""
        ...

    def schemes(
        self, config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, Scheme | None]:
        """The quantized ones among the linear modules, as a `quantization_config` (also other writers') says.

        Raises BadSource for what this format's reader does not do (desc_act, other versions, ...), by name.
        """
        ...

    def shape(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """[out, in] of a quantized module, by suffix as in `suffixes`; a few bytes of the file may be read.

        Raises BadSource.
        """
        ...
