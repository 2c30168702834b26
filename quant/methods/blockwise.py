"""NF4 and FP4: codebooks of 16 values, scaled by the largest weight of each block. No calibration.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (NF4:
the quantiles of a normal distribution; double quantization of the scales). FP4 is bitsandbytes' E2M1.
"""

from collections.abc import Callable, Mapping

from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import float_weight, install
from quant.numerics import encode_blockwise

BLOCKSIZE = 64


class BlockwiseMethod:
    calibrated = False

    def __init__(self, name: str) -> None:
        self.name = name

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: `blocksize` (weights that share a scale), `double_quant` (0: scales stay float32)."""
        blocksize = int(options.get("blocksize", BLOCKSIZE))
        nested = bool(options.get("double_quant", 1.0))
        layers, records = {}, []
        for name in plans:
            dtype = block.linears[name].weight.dtype
            layers[name] = encode_blockwise(float_weight(block, name), self.name, blocksize, nested, dtype)
            records.append(LayerRecord(module=f"{block.name}.{name}", method=self.name))
            report(records[-1])
        install(block, layers)
        return BlockResult(layers=layers, records=tuple(records))


NF4 = BlockwiseMethod("nf4")
FP4 = BlockwiseMethod("fp4")
