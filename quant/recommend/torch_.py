"""Presets of the formats that the torch backend serves: on GPUs, and from checkpoints only."""

from collections.abc import Mapping
from types import MappingProxyType

from quant.errors import BadRecipe
from quant.recipe import TORCH_PRESETS
from quant.recommend.facts import Facts
from quant.recommend.needs import CUDA_BYTES, Need, Option
from quant.safetensors_header import DTYPE_BYTES
from quant.source import Source
from quant.torch_plan import ModulePlan, TorchPlan, plan_torch

SPARE_SHARE = 0.05  # of the device's memory: the engine leaves it free
STEP_TOKENS = 2048
ACTIVATION_BYTES = 2

# Mean KL divergence of chat-34m from its source on held-out prose (docs/quantization.md). What a file of
# another format holds is its method's: gptq's for gptq-w4g128, awq's with symmetric codes for awq-w4g128.
LOSS: Mapping[str, float] = MappingProxyType(
    {
        "w8a16": 0.0007,
        "int8": 0.0016,
        "w8a8": 0.0033,
        "best": 0.0587,
        "w4a16": 0.0613,
        "gptq-w4g128": 0.0613,
        "awq-w4g128": 0.0923,
        "nf4": 0.1120,
    }
)
_OWN_BITS = {"nf4": 4, "int8": 8}  # of presets whose format has no scheme


def torch_options(source: Source, facts: Facts, need: Need) -> tuple[list[Option], dict[str, str]]:
    """(options, why a preset is none of them)."""
    options, refused = list[Option](), dict[str, str]()
    for preset in LOSS:
        try:
            plan = plan_torch(source, TORCH_PRESETS[preset], need.device)
        except BadRecipe as error:
            refused[preset] = str(error)
        else:
            options.append(_option(preset, plan, facts, need))
    return options, refused


def _option(preset: str, plan: TorchPlan, facts: Facts, need: Need) -> Option:
    packed = sum(one.bytes for one in plan.modules if not one.kept)
    codes = sum(_code_bytes(one, preset) for one in plan.modules if not one.kept)
    return Option(
        preset=preset,
        format=TORCH_PRESETS[preset].format,
        codes=codes,
        scales=packed - codes,
        kept=_kept(plan),
        kv=facts.kv(need),
        overhead=_overhead(facts, need),
        loss=LOSS[preset],
        build=_cost(plan),
    )


def _code_bytes(one: ModulePlan, preset: str) -> int:
    bits = one.scheme.bits if one.scheme else _OWN_BITS[preset]
    return one.shape[0] * one.shape[1] * bits // 8


def _kept(plan: TorchPlan) -> int:
    """Tensors that the file holds as the source has them."""
    packed = {f"{one.module}.weight" for one in plan.modules if not one.kept}
    return sum(
        tensor.elements * DTYPE_BYTES[tensor.dtype]
        for tensor in plan.layout.tensors
        if tensor.name not in packed
    )


def _overhead(facts: Facts, need: Need) -> int:
    """CUDA's own, a step's activations, the logits of its last rows, and what is left free."""
    step = ACTIVATION_BYTES * STEP_TOKENS * (4 * facts.hidden + 3 * facts.ffn)
    logits = 4 * need.parallel * facts.vocabulary
    return CUDA_BYTES + step + logits + int(SPARE_SHARE * need.memory)


def _cost(plan: TorchPlan) -> str:
    text = f"calibrated on {plan.text.said}" if plan.text else "no calibration"
    return (
        f"{text}, about {_time(plan.seconds)} on {plan.device}, "
        f"{plan.scratch_bytes / 1e6:,.0f} MB of scratch, {plan.memory_bytes / 1e6:,.0f} MB of memory"
    )


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
