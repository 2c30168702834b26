"""AWQ's scales, then GPTQ's codes: the one makes the weights easier to round, the other rounds them well."""

from collections.abc import Callable, Mapping

from quant.methods.awq import RATIOS, TOKENS, channel_scales
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.gptq import compensate
from quant.methods.rehearsal import Rehearsal
from quant.methods.search import search_scales


class AWQGPTQMethod:
    name = "awq+gptq"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: those of both."""
        assert inputs is not None
        with Rehearsal(block, inputs, plans, int(options.get("tokens", TOKENS))) as rehearsal:
            search_scales(rehearsal, channel_scales(int(options.get("ratios", RATIOS))))
        done = compensate(block, inputs, rehearsal.masters, plans, options, report, self.name)
        return BlockResult(
            layers={name: one.layer for name, one in done.items()},
            records=tuple(one.record for one in done.values()),
        )


AWQ_GPTQ = AWQGPTQMethod()
