"""A checkpoint's weights put into a model: streamed, layers of one input merged, nothing left out."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.checkpoint import read_config
from quant.errors import BadSource
from quant.formats.modules import QuantizedModule, quantized_modules
from quant.layer import QuantizedLinear
from server.backends.torch_.kernels.packed import CannotPack
from server.backends.torch_.linear.choose import Target, may_share, plain_linear, quantized_linear
from server.backends.torch_.linear.merged import Merged, Part
from server.backends.torch_.linear.plain import Head, PlainLinear
from server.backends.torch_.weights import Weights
from server.errors import OpenError

Progress = Callable[[float], None]

SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
DYNAMIC = frozenset({"compressed-tensors-int8"})  # formats whose activations are rounded to 8 bits, too
NEVER_NEEDED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|position_ids$")


def load_weights(model: Any, folder: Path, target: Target, progress: Progress) -> None:
    """Put the folder's weights into a skeleton, which is then ready to compute. Raises OpenError."""
    weights = Weights(folder)
    try:
        _Loader(model, weights, quantized_in(folder, weights), target, progress).load()
    except BadSource as error:
        raise OpenError(str(error)) from None
    finally:
        weights.close()


def quantized_in(folder: Path, weights: Weights) -> dict[str, QuantizedModule]:
    """The folder's quantized layers. Raises OpenError."""
    try:
        return quantized_modules(read_config(folder)[0], weights.headers)
    except BadSource as error:
        raise OpenError(str(error)) from None


class _Loader:
    def __init__(
        self,
        model: Any,
        weights: Weights,
        quantized: Mapping[str, QuantizedModule],
        target: Target,
        progress: Progress,
    ) -> None:
        self.model = model
        self.weights = weights
        self.quantized = quantized
        self.target = target
        self.progress = progress
        self._total = max(1, len(weights.unread))

    def load(self) -> None:
        for names in list(linear_groups(self.model)):
            self._linears(names)
            self.progress(1.0 - len(self.weights.unread) / self._total)
        self._rest()
        self._head()
        self._require_complete()

    # -- linear layers ----------------------------------------------------------------------------

    def _linears(self, names: list[str]) -> None:
        """Layers that share their input: as one where they can be, else one by one."""
        if self._is_tied_head(names[0]):
            return
        found = [self.quantized[name] for name in names if name in self.quantized]
        for name in names:
            self._require_shape(name)
        if not found:
            weights = [self.weights.read(f"{name}.weight") for name in names]
            self._place(names, plain_linear(weights, self._bias(names), self.target))
        elif len(found) == len(names) and self._quantized(names, found):
            return
        else:
            for name in names:
                self._linears([name])

    def _quantized(self, names: list[str], modules: list[QuantizedModule]) -> bool:
        """False where the layers cannot be one matrix."""
        layers = [self._unpack(module) for module in modules]
        dynamic = {module.format.name in DYNAMIC for module in modules}
        if len(names) > 1 and (not may_share(layers) or len(dynamic) > 1):
            return False
        try:
            whole = quantized_linear(layers, self._bias(names), self.target, dynamic=dynamic == {True})
        except CannotPack:
            return False
        self._place(names, whole)
        return True

    def _unpack(self, module: QuantizedModule) -> QuantizedLinear:
        tensors = {
            suffix: self.weights.read(info.name).to(self.target.device)
            for suffix, info in module.tensors.items()
        }
        return module.unpack(tensors)

    def _bias(self, names: list[str]) -> Tensor | None:
        if all(self.model.get_submodule(name).bias is None for name in names):
            return None
        sizes = self._sizes(names)
        out = torch.zeros(sum(sizes), dtype=self.target.dtype, device=self.target.device)
        for name, part in zip(names, torch.split(out, sizes), strict=True):
            if self.model.get_submodule(name).bias is not None:
                part.copy_(self.weights.read(f"{name}.bias"))
        return out

    def _sizes(self, names: list[str]) -> list[int]:
        return [self.model.get_submodule(name).out_features for name in names]

    def _place(self, names: list[str], whole: nn.Module) -> None:
        if len(names) == 1:
            self._set(names[0], whole)
            return
        merged = Merged(whole, self._sizes(names))
        for index, name in enumerate(names):
            self._set(name, Part(merged, index))

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    # -- everything else --------------------------------------------------------------------------

    def _rest(self) -> None:
        """Embeddings, norms and what else is a parameter or a buffer of a checkpoint."""
        for name, old in [*self.model.named_parameters(), *self.model.named_buffers()]:
            parent, _, child = name.rpartition(".")
            module = self.model.get_submodule(parent)
            if isinstance(old, nn.Parameter):
                if old.is_meta and not self._is_tied_head(parent):
                    module._parameters[child] = nn.Parameter(self._copy(name, old), requires_grad=False)
            elif name in self.weights and child not in module._non_persistent_buffers_set:
                module._buffers[child] = self._copy(name, old)
            else:
                module._buffers[child] = old.to(self.target.device)

    def _copy(self, name: str, like: Tensor) -> Tensor:
        tensor = self.weights.read(name)
        if tensor.shape != like.shape:
            raise OpenError(f"{name} is {list(tensor.shape)}; config.json asks for {list(like.shape)}")
        dtype = like.dtype if not like.is_floating_point() else self.target.dtype
        return tensor.to(self.target.device, dtype, copy=True)

    # -- the head ---------------------------------------------------------------------------------

    def _is_tied_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        ties = self.model.config.get_text_config().tie_word_embeddings
        return bool(ties and f"{name}.weight" not in self.weights and self.model.get_submodule(name) is head)

    def _head(self) -> None:
        """A head that the checkpoint leaves out is the embedding."""
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and head.weight.is_meta:
            self.model.set_output_embeddings(Head(self.model.get_input_embeddings().weight, None))
        elif isinstance(head, PlainLinear):
            self.model.set_output_embeddings(Head(head.weight, head.bias))

    # -- checks -----------------------------------------------------------------------------------

    def _require_shape(self, name: str) -> None:
        """Of a linear layer."""
        module = self.model.get_submodule(name)
        wanted = (module.out_features, module.in_features)
        found = self.quantized[name].shape if name in self.quantized else self.weights.shape(f"{name}.weight")
        if found != wanted:
            raise OpenError(f"{name} is {list(found)}; config.json asks for {list(wanted)}")

    def _require_complete(self) -> None:
        parts = [*self.model.named_parameters(), *self.model.named_buffers()]
        if hollow := [name for name, tensor in parts if tensor.is_meta]:
            raise OpenError(f"the checkpoint lacks tensor {hollow[0]}")
        if extra := sorted(name for name in self.weights.unread if not NEVER_NEEDED.search(name)):
            raise OpenError(f"the model has no place for tensor {extra[0]}")


def linear_groups(model: nn.Module) -> Iterator[list[str]]:
    """Names of linear layers, those that share their input together, in the order of the model."""
    for name, module in model.named_modules():
        children = {child: m for child, m in module.named_children() if type(m) is nn.Linear}
        prefix = f"{name}." if name else ""
        for group in SHARE_INPUT:
            if children.keys() >= set(group):
                yield [prefix + child for child in group]
                for child in group:
                    del children[child]
        yield from ([prefix + child] for child in children)
