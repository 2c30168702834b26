"""Experts as linears of their own, under the names that checkpoints give them.

transformers 5 keeps the experts of a layer as two tensors of three dimensions. Methods quantize matrices one
by one, and checkpoints hold them one by one, so a layer is given a list of experts in their place.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quant.families import Experts


class Expert(nn.Module):
    """A gated MLP. `wanted`: names of its gate, up and down."""

    def __init__(self, hidden: int, width: int, wanted: Experts, activation: nn.Module) -> None:
        super().__init__()
        for name, rows, columns in (
            (wanted.gate, width, hidden),
            (wanted.up, width, hidden),
            (wanted.down, hidden, width),
        ):
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self._names = (wanted.gate, wanted.up, wanted.down)
        self._activation = [activation]  # in a list: it is no part of a checkpoint

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self._names)
        out: Tensor = down(self._activation[0](gate(x)) * up(x))
        return out


class ExpertList(nn.Module):
    """In the place of transformers' experts, with their arguments and results."""

    def __init__(self, fused: Any, wanted: Experts) -> None:
        super().__init__()
        self.count: int = fused.num_experts
        for number in range(self.count):
            expert = Expert(fused.hidden_dim, fused.intermediate_dim, wanted, fused.act_fn)
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; index and weights [tokens, experts of a token]."""
        out = torch.zeros_like(hidden_states)
        for number in sorted({*top_k_index.flatten().tolist()}):
            tokens, place = torch.where(top_k_index == number)
            made = getattr(self, str(number))(hidden_states[tokens])
            out.index_add_(0, tokens, (made * top_k_weights[tokens, place, None]).to(out.dtype))
        return out


def unfuse(layer: nn.Module, wanted: Experts) -> None:
    """Give a decoder layer of transformers (built on `meta`) a list of experts, under the checkpoint's names.

    A layer without experts stays as it is.
    """
    mixture: Any = layer.mlp
    if not hasattr(mixture, "experts"):
        return
    with torch.device("meta"):
        mixture.experts = ExpertList(mixture.experts, wanted)
    if wanted.mixture != "mlp":
        del layer.mlp
        layer.add_module(wanted.mixture, mixture)
        layer.__dict__["mlp"] = mixture  # the name by which the layer's code calls it, which is no submodule
