"""Decoder layers of the Llama kind with what lies between their matrices done at once.

transformers' own layers launch some forty kernels between the matrices, which is most of a GPU's time in a
decode step of one sequence. These do the same with six, and compute the same numbers on a CPU.

What the layers add to is float32, and so are the matrices' results: in halves their roundings are two thirds
of what a logprob is off by.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from server.backends.torch_.attention import Paged, Rule, attend
from server.backends.torch_.kernels.activations import add_rms_norm, rms_norm, rope_and_store, silu_mul
from server.backends.torch_.linear.merged import Merged, Part

# Layers that are fused, and how each says what its sliding window is.
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}


def fuse(model: Any) -> int:
    """Put fused layers in the place of those that allow it, and say how many they are."""
    layers: Any = getattr(model.base_model, "layers", None)
    places = [place for place, layer in enumerate(layers or ()) if _is_fusable(layer)]
    for place in places:
        layers[place] = FusedLayer(layers[place])
    wide = {place - 1 for place in places}
    if places and hasattr(getattr(model.base_model, "norm", None), "variance_epsilon"):
        model.base_model.norm = Norm(model.base_model.norm)
        wide.add(len(layers) - 1)
    for place in places:
        layers[place].narrows = place not in wide
    if len(places) == len(layers or ()) and hasattr(model.base_model, "rotary_emb"):
        model.base_model.rotary_emb = WideRotary(model.base_model.rotary_emb)
    return len(places)


def _is_fusable(layer: Any) -> bool:
    if type(layer).__name__ not in WINDOWS:
        return False
    activation = type(layer.mlp.act_fn).__name__
    parts = (layer.self_attn.q_proj, layer.mlp.gate_proj)
    return activation in {"SiLU", "SiLUActivation"} and all(isinstance(part, Part) for part in parts)


def _whole(part: Part) -> nn.Module:
    merged = part.merged
    assert isinstance(merged, Merged)
    return merged.whole


class Norm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor = norm.weight
        self.epsilon: float = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class WideRotary(nn.Module):
    """cos and sin of positions in float32, in which they are computed, not rounded to the model's dtype."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        cos, sin = self.inner(x.new_empty(0, dtype=torch.float32), *args, **kwargs)
        return cos, sin


class FusedLayer(nn.Module):
    """Takes the place of a transformers decoder layer; takes what that takes, or the same in float32."""

    narrows = False  # whether the next layer is transformers' own, which takes the dtype of the weights alone

    def __init__(self, layer: Any) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.before_attention = Norm(layer.input_layernorm)
        self.before_mlp = Norm(layer.post_attention_layernorm)
        self.attention = FusedAttention(layer.self_attn, WINDOWS[type(layer).__name__](layer.self_attn))
        self.gate_up = _whole(layer.mlp.gate_proj)
        self.down = layer.mlp.down_proj

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: Paged, **_: object
    ) -> Tensor:
        cos, sin = (table[0].float() for table in position_embeddings)
        stream = hidden_states.float()
        out = self.attention(self.before_attention(stream)[0], cos, sin, paged)[None]
        norm = self.before_mlp
        normed, stream = add_rms_norm(out, stream, norm.weight, norm.epsilon)
        down: Tensor = self.down(silu_mul(self.gate_up(normed, wide=True), normed.dtype), wide=True)
        return down.add_(stream).to(normed.dtype) if self.narrows else down.add_(stream)


class FusedAttention(nn.Module):
    def __init__(self, attention: Any, window: int | None) -> None:
        super().__init__()
        self.qkv = _whole(attention.q_proj)
        self.out = attention.o_proj
        self.layer: int = attention.layer_idx
        self.heads: int = attention.config.num_attention_heads
        self.rule = Rule(attention.scaling, window, None)
        self.size: int = attention.head_dim
        self.q_norm = Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = Norm(attention.k_norm) if hasattr(attention, "k_norm") else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, paged: Paged) -> Tensor:
        """x [tokens, width] -> the same shape in float32."""
        keys, values = paged.cache.keys[self.layer], paged.cache.values[self.layer]
        paged.calls += 1
        qkv = self._normed(self.qkv(x, wide=True), keys.shape[2])
        q = rope_and_store(qkv, cos, sin, keys, values, paged.layout.places, self.heads)
        out: Tensor = self.out(attend(q, keys, values, paged, self.rule).flatten(1), wide=True)
        return out

    def _normed(self, qkv: Tensor, kv_heads: int) -> Tensor:
        """Qwen3 normalizes each head's queries and keys before they are turned."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        heads = qkv.view(len(qkv), -1, self.size)
        heads[:, : self.heads] = self.q_norm(heads[:, : self.heads])
        heads[:, self.heads : self.heads + kv_heads] = self.k_norm(
            heads[:, self.heads : self.heads + kv_heads]
        )
        return heads.flatten(1)
