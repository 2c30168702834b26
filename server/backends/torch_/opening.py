"""From a folder to an executor: device, weights, KV memory, and a first pass that proves the model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.backends.torch_.attention import Layout, Paged, Unsupported
from server.backends.torch_.embedder import TorchEmbedder
from server.backends.torch_.executor import TorchExecutor, forward
from server.backends.torch_.inputs import Inputs
from server.backends.torch_.kv import PAGE, KVCache, KVShape, PageTables
from server.backends.torch_.linear.choose import Target
from server.backends.torch_.load import load_weights
from server.backends.torch_.machine import choose_device, choose_target, free_memory, set_threads
from server.backends.torch_.model import kv_shape, model_config, skeleton
from server.backends.torch_.options import Options
from server.errors import OpenError
from server.types import Limits, Open

STEP_TOKENS = {"cpu": 256, "cuda": 2048}
SPARE_SLOTS = 8  # beyond twice `parallel`: slots are cheap here, and keep prefixes


def open_variant(
    spec: Open, options: Options, threads: int, progress: Callable[[float], None]
) -> tuple[TorchExecutor, TorchEmbedder]:
    """Raises OpenError."""
    set_threads(spec.threads or threads)
    folder = Path(spec.variant)
    device = choose_device(options)
    config = model_config(folder)
    own = config.dtype
    model = skeleton(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    target = choose_target(options, device, own, elements)
    load_weights(model, folder, target, lambda done: progress(0.9 * done))
    shape = kv_shape(config)
    limits = limits_for(spec, options, config, shape, target)
    tables = PageTables(-(-limits.kv_tokens // PAGE), limits.slots, limits.context)
    cache = KVCache(shape, -(-limits.kv_tokens // PAGE), target.dtype, device)
    prove(model, cache, shape)
    progress(1.0)
    depth = options.depth or (2 if device.type == "cuda" else 1)
    executor = TorchExecutor(model, limits, tables, cache, depth)
    return executor, TorchEmbedder(model, shape, limits.context)


def limits_for(spec: Open, options: Options, config: Any, shape: KVShape, target: Target) -> Limits:
    """What the engine will hold. Raises OpenError for a combination that cannot work."""
    longest = config.get_text_config().max_position_embeddings
    context = spec.context or longest
    if context > longest:
        raise OpenError(f"context is {context}; the model's positions end at {longest}")
    slots = options.slots or 2 * spec.parallel + SPARE_SLOTS
    kv_tokens = spec.kv_tokens or context * spec.parallel
    step_tokens = max(options.step_tokens or STEP_TOKENS[target.device.type], spec.parallel + PAGE)
    needed, free = kv_tokens * shape.bytes_per_token(target.dtype), free_memory(target.device)
    if needed > free:
        raise OpenError(f"KV memory for {kv_tokens:,} tokens is {needed:,} bytes; {free:,} are free")
    try:
        return Limits(
            running=spec.parallel,
            slots=slots,
            context=context,
            kv_tokens=kv_tokens,
            step_tokens=step_tokens,
            page=PAGE,
            deterministic=options.deterministic,
        )
    except ValueError as error:
        raise OpenError(str(error)) from None


@torch.inference_mode()
def prove(model: Any, cache: KVCache, shape: KVShape) -> None:
    """One token through the model, into page 0. Raises OpenError for an attention that is not built."""
    device = cache.keys[0].device
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    layout = Layout(zero, zero[None], zero + 1)
    paged = Paged(cache, layout)
    try:
        forward(model, Inputs(zero, zero, layout, zero, zero), paged)
    except Unsupported as error:
        raise OpenError(f"the model cannot be served: {error}") from None
    if paged.calls != shape.layers:
        raise OpenError(f"only {paged.calls} of {shape.layers} layers attend through paged KV memory")
    cache.scrub(np.zeros(1, np.int32))
