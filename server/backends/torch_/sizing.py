"""How much an engine will hold: slots, context, and KV memory out of what is free."""

from typing import Any

from server.backends.torch_.kv import PAGE, KVShape
from server.backends.torch_.linear.choose import Target
from server.backends.torch_.machine import free_memory
from server.backends.torch_.options import Options
from server.errors import OpenError
from server.types import Limits, Open

STEP_TOKENS = {"cpu": 256, "cuda": 2048}
SPARE_SLOTS = 8  # beyond twice `parallel`: slots are cheap here, and keep prefixes
SPARE_SHARE = 0.05  # of a GPU's free memory, for what a first measurement does not see


def limits_for(
    spec: Open, options: Options, config: Any, shape: KVShape, target: Target, peak: int
) -> Limits:
    """`peak`: bytes that a step needs for itself. Raises OpenError for a combination that cannot work."""
    longest = config.get_text_config().max_position_embeddings
    context = spec.context or longest
    if context > longest:
        raise OpenError(f"context is {context}; the model's positions end at {longest}")
    kv_tokens = _kv_tokens(spec, context, shape.bytes_per_token(target.dtype), target, peak)
    try:
        return Limits(
            running=spec.parallel,
            slots=options.slots or 2 * spec.parallel + SPARE_SLOTS,
            context=context,
            kv_tokens=kv_tokens,
            step_tokens=step_tokens(spec, options, target),
            page=PAGE,
            deterministic=options.deterministic,
        )
    except ValueError as error:
        raise OpenError(str(error)) from None


def step_tokens(spec: Open, options: Options, target: Target) -> int:
    return max(options.step_tokens or STEP_TOKENS[target.device.type], spec.parallel + PAGE)


def _kv_tokens(spec: Open, context: int, bytes_per_token: int, target: Target, peak: int) -> int:
    """What was asked for; left open, a context for each running sequence or, on a GPU, what of it fits."""
    free = free_memory(target.device) - peak
    if target.device.type == "cuda":
        free = int(free * (1.0 - SPARE_SHARE))
    fits = max(0, free) // (bytes_per_token * PAGE) * PAGE
    wanted = spec.kv_tokens or context * spec.parallel
    if wanted <= fits:
        return wanted
    if spec.kv_tokens is None and target.device.type == "cuda" and fits >= context:
        return fits
    least = spec.kv_tokens or (context if target.device.type == "cuda" else wanted)
    raise OpenError(
        f"KV memory for {least:,} tokens needs {least * bytes_per_token:,} bytes; there is room for "
        f"{fits:,} tokens"
    )
