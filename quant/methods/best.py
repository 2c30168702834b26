"""The best codes we know to make: AWQ's scales, GPTQ's codes, then rounding learned for the whole block."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from quant.methods.awq_gptq import scale_for_gptq
from quant.methods.base import Activations, Block, BlockResult, LayerPlan, LayerRecord
from quant.methods.gptq import Compensated, compensate
from quant.methods.layers import install
from quant.methods.learning import Sample, learn_rounding
from quant.methods.rehearsal import Rehearsal

TOKENS = 8192  # of the calibration text that are learned from
BATCH_TOKENS = 1024  # a step
STEPS = 100


class BestMethod:
    name = "best"
    calibrated = True

    def quantize(
        self,
        block: Block,
        inputs: Activations | None,
        plans: Mapping[str, LayerPlan],
        options: Mapping[str, float],
        report: Callable[[LayerRecord], None],
    ) -> BlockResult:
        """Options: those of awq and gptq; `steps` (50 to 200), `batch` (tokens a step)."""
        assert inputs is not None
        with Rehearsal(block, inputs, plans, int(options.get("tokens", TOKENS))) as rehearsal:
            scale_for_gptq(rehearsal, options)
        done = compensate(block, inputs, dict(rehearsal.masters), plans, options, lambda _: None, "awq+gptq")
        sample = Sample.of(torch.cat(rehearsal.hidden), torch.cat(rehearsal.targets))
        batch = max(1, int(options.get("batch", BATCH_TOKENS)) // sample.hidden.shape[1])
        block.module.float()
        layers = learn_rounding(block, sample, done, int(options.get("steps", STEPS)), batch)
        block.module.to(rehearsal.dtype)
        install(block, layers)
        records = tuple(
            one.record
            if layers[name] is one.layer
            else _learned(one, rehearsal.layer_error(name, layers[name]))
            for name, one in done.items()
        )
        for record in records:
            report(record)
        return BlockResult(layers=layers, records=records)


def _learned(start: Compensated, loss: float) -> LayerRecord:
    """Learning looks at the block's output: a single layer's error may rise above that of the start."""
    return replace(start.record, method="best", loss=loss, fallback=None)


BEST = BestMethod()
