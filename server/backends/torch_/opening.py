"""From a folder to an executor: device, weights, KV memory, and a first pass that proves the model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.backends.llama.threads import useful_threads
from server.backends.torch_.allocator import giving_back
from server.backends.torch_.attention import Chunk, Layout, Paged, Unsupported
from server.backends.torch_.embedder import TorchEmbedder
from server.backends.torch_.executor import TorchExecutor, forward
from server.backends.torch_.fused import fuse
from server.backends.torch_.graphs import SIZES, CudaRecorder, Recorder, Replays, Slate, record
from server.backends.torch_.inputs import Inputs
from server.backends.torch_.kernels.linear import compiled
from server.backends.torch_.kv import PAGE, KVCache, KVShape, PageTables
from server.backends.torch_.linear.choose import Target
from server.backends.torch_.load import load_weights
from server.backends.torch_.machine import choose_device, choose_target, set_threads
from server.backends.torch_.model import has_experts, kv_shape, model_config, settle_rope, skeleton
from server.backends.torch_.options import Options
from server.backends.torch_.sizing import limits_for, step_tokens
from server.errors import OpenError
from server.types import Limits, Open

LOADED, PROVED = 0.85, 0.9  # how much of opening is done after weights, and after the first passes


def open_variant(
    spec: Open, options: Options, threads: int, progress: Callable[[float], None]
) -> tuple[TorchExecutor, TorchEmbedder]:
    """Raises OpenError."""
    set_threads(spec.threads or threads)
    model, shape, target = _load(Path(spec.variant), options, lambda done: progress(LOADED * done))
    config = model.config
    settle_rope(model, spec.context or config.get_text_config().max_position_embeddings)
    peak = _prove(model, shape, target, step_tokens(spec, options, target), spec.parallel)
    limits = limits_for(spec, options, config, shape, target, peak)
    progress(PROVED)
    pages = -(-limits.kv_tokens // PAGE)
    tables = PageTables(pages, limits.slots, limits.context)
    cache = KVCache(shape, pages, target.dtype, target.device)
    on_gpu = target.device.type == "cuda"
    executor = TorchExecutor(model, limits, tables, cache, options.depth or (2 if on_gpu else 1))
    if on_gpu and options.graphs and compiled(target.device) and not has_experts(model):
        executor.replay = replays(
            model, cache, limits, CudaRecorder(), lambda done: progress(PROVED + (1 - PROVED) * done)
        )
    progress(1.0)
    return executor, TorchEmbedder(model, shape, limits.context)


def _load(folder: Path, options: Options, progress: Callable[[float], None]) -> tuple[Any, KVShape, Target]:
    device = choose_device(options)
    config = model_config(folder)
    shape, own = kv_shape(config), config.dtype
    model = skeleton(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    target = choose_target(options, device, own, elements)
    try:
        with giving_back():
            load_weights(model, folder, target, progress)
    except torch.OutOfMemoryError:
        raise OpenError(f"the weights do not fit into the memory of {device.type}") from None
    if options.fused:
        fuse(model)
    if device.type == "cpu":
        _spare_threads(model, elements * target.dtype.itemsize)
    return model, shape, target


def _spare_threads(model: Any, weight_bytes: int) -> None:
    """Each pass gets as many threads as make it faster: by its size alone, so that its sums stay its own."""
    allowed = torch.get_num_threads()

    def before(_module: Any, _: Any, given: dict[str, Any]) -> None:
        torch.set_num_threads(useful_threads(allowed, weight_bytes * given["input_ids"].shape[1]))

    model.base_model.register_forward_pre_hook(before, with_kwargs=True)


@torch.inference_mode()
def replays(
    model: Any, cache: KVCache, limits: Limits, recorder: Recorder, progress: Callable[[float], None]
) -> Replays:
    """Decode steps of up to `running` rows, recorded."""
    vocab_size = model.config.get_text_config().vocab_size
    largest = min(limits.running, SIZES[-1])
    rows = next(size for size in SIZES if size >= largest)
    slate = Slate(rows, -(-limits.context // PAGE), vocab_size, cache.keys[0].device)
    slate.lengths.fill_(1)

    def run(inputs: Inputs) -> torch.Tensor:
        return forward(model, inputs, Paged(cache, inputs.layout))

    found = record(slate, run, largest, recorder, progress)
    cache.scrub(np.zeros(1, np.int32))
    return found


def _prove(model: Any, shape: KVShape, target: Target, tokens: int, rows: int) -> int:
    """First passes, in a small KV memory: one token, which shows whether the model runs, and on a GPU a whole
    step, which shows how many bytes it needs. Raises OpenError."""
    on_gpu = target.device.type == "cuda"
    cache = KVCache(shape, -(-tokens // PAGE) if on_gpu else 1, target.dtype, target.device)
    _require_attention(model, cache, shape)
    if not on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    _whole_step(model, cache, tokens, rows)
    peak = torch.cuda.max_memory_allocated() - held
    cache.close()
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def _whole_step(model: Any, cache: KVCache, tokens: int, rows: int) -> None:
    """One prompt of so many tokens, and the logits of so many of them, sorted."""
    device = cache.keys[0].device
    numbers = torch.arange(tokens, device=device)
    pages = torch.arange(1, -(-tokens // PAGE) + 1, device=device)
    none = numbers[:0]
    layout = Layout(numbers + PAGE, none[:, None].int(), none.int(), [Chunk(0, tokens, 0, pages)])
    inputs = Inputs(numbers * 0, numbers, layout, numbers[-rows:], none)
    forward(model, inputs, Paged(cache, layout)).sort(dim=-1)
    torch.cuda.synchronize()


@torch.inference_mode()
def _require_attention(model: Any, cache: KVCache, shape: KVShape) -> None:
    """One token through the model, into page 0. Raises OpenError for an attention that is not built."""
    device = cache.keys[0].device
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    layout = Layout(zero, zero[None].int(), (zero + 1).int())
    paged = Paged(cache, layout)
    try:
        forward(model, Inputs(zero, zero, layout, zero, zero), paged)
    except Unsupported as error:
        raise OpenError(f"the model cannot be served: {error}") from None
    if paged.calls != shape.layers:
        raise OpenError(f"only {paged.calls} of {shape.layers} layers attend through paged KV memory")
    cache.scrub(np.zeros(1, np.int32))
