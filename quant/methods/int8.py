"""LLM.int8: int8 rows, and activations whose outlier columns stay in floating point.

Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
NeurIPS 2022. Outliers are the activations', so a build needs no calibration: they are found when it runs.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from quant.layer import Int8Linear
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import float_weight, install
from quant.numerics import encode_rows_int8

THRESHOLD = 6.0  # the paper's; columns with an activation at least this large are outliers


class Int8Method:
    name = "int8"
    calibrated = False

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        layers = {name: encode_rows_int8(float_weight(block, name)) for name in plans}
        records = tuple(LayerRecord(module=f"{block.name}.{name}", method=self.name) for name in plans)
        install(block, layers)
        for record in records:
            report(record)
        return BlockResult(layers=layers, records=records)


def mixed_matmul(x: Tensor, layer: Int8Linear, threshold: float = THRESHOLD) -> Tensor:
    """x [tokens, in] -> float32 [tokens, out] as LLM.int8 computes it; the reference for faster kernels.

    Columns with outliers are multiplied in floating point with the weights that the codes stand for, the rest
    as int8 x int8 with a scale for each token and each row.
    """
    x = x.float()
    outliers = (x.abs() >= threshold).any(0)
    rest = x.masked_fill(outliers, 0.0)
    scale = rest.abs().amax(1, keepdim=True).clamp(min=1e-10) / 127.0
    codes = (rest / scale).round()
    # float64 holds every sum of int8 products exactly, as int32 does
    products = (codes.double() @ layer.codes.double().T).float()
    result = products * scale * (layer.absmax / 127.0)
    kept = layer.codes[:, outliers].float() * (layer.absmax / 127.0)[:, None]
    return result + x[:, outliers] @ kept.T


INT8 = Int8Method()
