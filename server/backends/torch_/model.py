"""transformers' modeling code without weights: built on `meta`, with our attention."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quant.experts import ExpertList, unfuse
from quant.families import FAMILIES
from server.backends.torch_.attention import NAME, paged_attention
from server.backends.torch_.kv import KVShape
from server.errors import OpenError

UNEVEN_ROPE = "dynamic"  # the longest sequence of a batch would turn all others
LONG_ROPE = "longrope"

AttentionInterface.register(NAME, paged_attention)
for name in ("transformers.modeling_rope_utils", "transformers.configuration_utils"):
    logging.getLogger(name).setLevel(logging.ERROR)


def model_config(folder: Path) -> Any:
    """transformers' config of the folder. Raises OpenError."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OpenError(f"transformers cannot read config.json: {_line(error)}") from None


def skeleton(config: Any) -> Any:
    """The model with parameters on `meta` and every buffer that is in no checkpoint. Raises OpenError."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = (config.architectures or ["?"])[0]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise OpenError(f"transformers cannot build {architecture}: {_line(error)}") from None
    _require_runnable(model, architecture)
    _separate_experts(model, architecture)
    _fill_buffers(model)
    return model.eval()


def kv_shape(config: Any) -> KVShape:
    text = config.get_text_config()
    heads = text.num_attention_heads
    return KVShape(
        layers=text.num_hidden_layers,
        heads=getattr(text, "num_key_value_heads", None) or heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _require_runnable(model: Any, architecture: str) -> None:
    if getattr(model, "_is_stateful", False) or not getattr(model, "_supports_attention_backend", False):
        raise OpenError(f"{architecture} keeps other state than keys and values, which is not built")
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    if UNEVEN_ROPE in {table.get("rope_type") for table in tables}:
        raise OpenError(f"{architecture} turns positions by {UNEVEN_ROPE} RoPE, which is not built")


def _separate_experts(model: Any, architecture: str) -> None:
    """A linear of their own for each matrix, as checkpoints have them and formats store them."""
    family = FAMILIES.get(architecture)
    if family and family.experts:
        for layer in model.base_model.layers:
            unfuse(layer, family.experts)


def has_experts(model: Any) -> bool:
    """Which of them a token meets is known only when it is computed: such steps cannot be recorded."""
    return any(isinstance(module, ExpertList) for module in model.modules())


def settle_rope(model: Any, context: int) -> None:
    """LongRoPE has frequencies for contexts up to the one of pretraining, and others for longer ones.

    transformers looks at the longest sequence of a batch; here `context` decides, as in llama.cpp."""
    for module in model.modules():
        if getattr(module, "rope_type", None) != LONG_ROPE:
            continue
        original = module.config.rope_parameters["original_max_position_embeddings"]
        if context > original:
            make = ROPE_INIT_FUNCTIONS[LONG_ROPE]
            long, _ = make(module.config, module.inv_freq.device, seq_len=original + 1)
            module.inv_freq.copy_(long)
        module.rope_type = "default"


def _fill_buffers(model: Any) -> None:
    """What constructors compute and checkpoints leave out (RoPE's frequencies); parameters stay on `meta`."""
    for module in model.modules():
        hollow = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if hollow:
            for name in hollow:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            with torch.no_grad():
                model._init_weights(module)


def _line(error: BaseException) -> str:
    """The first line of an error of another library, short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
