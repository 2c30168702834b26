"""Round-to-nearest: each weight to the nearest point of its group's grid. Looks at no activations."""

from collections.abc import Callable, Mapping

from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.layers import affine_scheme, float_weight, install
from quant.numerics import round_to_nearest


class RoundToNearest:
    name = "rtn"
    calibrated = False

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        layers, records = {}, []
        for name, plan in plans.items():
            weight = float_weight(block, name)
            layers[name] = round_to_nearest(weight, affine_scheme(block, name, plan), plan.scale_dtype)
            records.append(LayerRecord(module=f"{block.name}.{name}", method=self.name))
            report(records[-1])
        install(block, layers)
        return BlockResult(layers=layers, records=tuple(records))


RTN = RoundToNearest()
