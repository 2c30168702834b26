"""One decoder block between the checkpoint's file, a method, and the variant's file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.block import Decoder, DecoderBlock
from quant.errors import BadSource
from quant.formats.base import Format
from quant.layer import AffineLinear, CodebookLinear, QuantizedLinear
from quant.methods.base import BlockResult, LayerPlan
from quant.methods.smoothquant import round_activations
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme
from quant.tensors import DTYPES, cast
from quant.torch_recipe import RULES

Infos = Mapping[str, TensorInfo]  # of one block, by name below it


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What is the same for all blocks of a build."""

    decoder: Decoder
    format: Format
    schemes: Mapping[str, Scheme | None]  # of the modules that are quantized, by full name
    stored: torch.dtype  # of the source's linears
    computed: torch.dtype  # of blocks and hidden states
    device: torch.device

    def make(self, index: int, tensors: Mapping[str, Tensor]) -> DecoderBlock:
        moved = {name: tensor.to(self.device, self.computed) for name, tensor in tensors.items()}
        return self.decoder.block(index, moved)

    def plans(self, block: DecoderBlock) -> dict[str, LayerPlan]:
        dtype = self.format.scale_dtype(self.stored)
        return {
            name: LayerPlan(scheme=self.schemes[f"{block.name}.{name}"], scale_dtype=dtype)
            for name in block.linears
            if f"{block.name}.{name}" in self.schemes
        }

    def pack(self, block: DecoderBlock, result: BlockResult, infos: Infos) -> dict[str, Tensor]:
        """Tensors of the file by full name: quantized linears in the order of computation, then the rest.

        Raises BadSource for a number that the file's type cannot hold."""
        tensors: dict[str, Tensor] = {}
        for name, layer in result.layers.items():
            _require_reach(layer, infos[f"{name}.weight"])
            for part, tensor in self.format.pack(self._stored(layer)).items():
                tensors[f"{block.name}.{name}.{part}"] = tensor.cpu()
        for name, value in block.module.state_dict().items():
            linear, _, part = name.rpartition(".")
            if linear not in result.layers:
                tensors[f"{block.name}.{name}"] = cast(value, DTYPES[infos[name].dtype], infos[name].name)
            elif part != "weight":
                dtype = self._bias_dtype(DTYPES[infos[name].dtype])
                tensors[f"{block.name}.{name}"] = cast(value, dtype, infos[name].name)
        return tensors

    def unpack(self, index: int, infos: Infos, tensors: Mapping[str, Tensor]) -> DecoderBlock:
        """The block as the variant computes it, from what `pack` made. Hidden states go on through it only,
        so that a build that was killed goes on with the same numbers."""
        name = self.decoder.family.block_name(index)
        below = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
        values: dict[str, Tensor] = {}
        for linear in self.decoder.family.linears:
            if f"{name}.{linear}" not in self.schemes:
                continue
            values[f"{linear}.weight"] = self._take(f"{name}.{linear}", linear, infos, below).dequantize()
        block = self.make(index, {**values, **below})
        rule = RULES.get(self.format.name)
        if rule and rule.rounds_activations:
            round_activations(block, self.plans(block))
        return block

    def sample(self, index: int, infos: Infos, tensors: Mapping[str, Tensor]) -> QuantizedLinear | None:
        """Some quantized layer of the block, if it has one."""
        name = self.decoder.family.block_name(index)
        below = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
        for linear in self.decoder.family.linears:
            if f"{name}.{linear}" in self.schemes:
                return self._take(f"{name}.{linear}", linear, infos, below)
        return None

    def _take(self, module: str, linear: str, infos: Infos, below: dict[str, Tensor]) -> QuantizedLinear:
        """A layer out of the tensors of its block."""
        names = {suffix: f"{linear}.{suffix}" for suffix in self.format.suffixes}
        packed = {suffix: below.pop(name) for suffix, name in names.items() if name in below}
        rows, columns = infos[f"{linear}.weight"].shape
        moved = {suffix: tensor.to(self.device) for suffix, tensor in packed.items()}
        return self.format.unpack(moved, (rows, columns), self.schemes[module])

    def _stored(self, layer: QuantizedLinear) -> QuantizedLinear:
        """Codebook formats also write what readers are to decode into: the source's type."""
        return replace(layer, dtype=self.stored) if isinstance(layer, CodebookLinear) else layer

    def _bias_dtype(self, source: torch.dtype) -> torch.dtype:
        """Formats of float16 scales hold the biases beside them in float16 too."""
        return torch.float16 if self.format.scale_dtype(source) is torch.float16 else source


def _require_reach(layer: QuantizedLinear, source: TensorInfo) -> None:
    """A scale that is its type's largest number was cut off there: float16's ends at 65,504."""
    if isinstance(layer, AffineLinear):
        dtype = layer.scales.dtype
        if bool((layer.scales >= torch.finfo(dtype).max).any()):
            kind = str(dtype).removeprefix("torch.")
            raise BadSource(f"{source.said} has weights too large for {kind} scales")
