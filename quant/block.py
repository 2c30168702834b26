"""One decoder block at a time: transformers' own layer class, holding weights that are handed to it.

The layer is built on the `meta` device, so that nothing is allocated twice, and its parameters are assigned.
Methods change the module's weights; calling the block computes with whatever it holds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from quant.errors import BadSource, BuildFailed
from quant.experts import unfuse
from quant.families import Family, family_of


class Decoder:
    """What the blocks of one model share: its config as transformers reads it, and the rotary embedding."""

    def __init__(self, architecture: str, values: Mapping[str, Any]) -> None:
        """`values`: the parsed config.json. Raises UnsupportedArchitecture, or BadSource for a config that
        transformers refuses."""
        self.family = family_of(architecture).of(values)
        classes = import_module(self.family.package)
        self._layer = getattr(classes, f"{self.family.prefix}DecoderLayer")
        try:
            config = f"{self.family.config or self.family.prefix}Config"
            self.config = getattr(classes, config).from_dict(dict(values))
            self.config._attn_implementation = self.family.attention
            self._rotary: nn.Module = getattr(classes, f"{self.family.prefix}RotaryEmbedding")(self.config)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            first = str(error).strip().rpartition("\n")[2].strip()
            raise BadSource(f"config.json: transformers refuses it: {first:.200}") from error

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies embeddings by before the first block."""
        match self.family.embedding_scale:
            case "root":
                return float(self.config.hidden_size**0.5)
            case "multiplier":
                return float(self.config.embedding_multiplier)
            case "none":
                return 1.0

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> "DecoderBlock":
        """`tensors`: by name below the block, all of one dtype and device; they are not copied.

        Raises BadSource for missing or unexpected tensors, other shapes, NaN or infinite values."""
        name = self.family.block_name(index)
        with torch.device("meta"):
            module = self._made(index)
        _check_tensors(name, module, tensors)
        module.load_state_dict(dict(tensors), strict=True, assign=True)
        module.eval().requires_grad_(False)
        typed = self.config.layer_types[index] if self.family.rotary == "typed" else None
        return DecoderBlock(name, module, self.family, Rotary(self._rotary, typed), self._window(index))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a block by name below it, without allocating one."""
        with torch.device("meta"):
            module = self._made(0)
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def _made(self, index: int) -> nn.Module:
        module: nn.Module = self._layer(self.config, index)
        if self.family.experts:
            unfuse(module, self.family.experts)
        return module

    def _window(self, index: int) -> int | None:
        window: int | None = getattr(self.config, "sliding_window", None)
        match self.family.window:
            case "all":
                return window
            case "typed":
                return window if self.config.layer_types[index] == "sliding_attention" else None
            case "none":
                return None


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys of one block."""

    module: nn.Module
    kind: str | None  # of the layer, where the model has several

    def __call__(self, hidden: Tensor, positions: Tensor) -> Any:
        module = self.module.to(hidden.device)
        return module(hidden, positions) if self.kind is None else module(hidden, positions, self.kind)


class DecoderBlock:
    """Implements quant.methods.base.Block."""

    def __init__(
        self, name: str, module: nn.Module, family: Family, rotary: Rotary, window: int | None
    ) -> None:
        self.name = name
        self.module = module
        self.family = family
        self.window = window  # tokens that a position looks back on, itself included; None: all
        self._rotary = rotary
        self.linears: Mapping[str, nn.Linear] = {
            linear: _linear(module.get_submodule(linear)) for linear in family.linears
        }

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.linears.values())).weight.dtype

    def to(self, device: torch.device | str) -> "DecoderBlock":
        self.module.to(device)
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        """[samples, tokens, hidden] -> the same shape. Raises BuildFailed naming the first module whose
        output is NaN or infinite."""
        output = self._forward(hidden)
        if not bool(torch.isfinite(output.detach()).all()):
            raise BuildFailed(f"{self._culprit(hidden)}: its output has NaN or infinite values")
        return output

    def _forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        positions = torch.arange(tokens, device=hidden.device)[None]
        output: Tensor = self.module(
            hidden,
            attention_mask=self._mask(tokens, hidden),
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )
        return output

    def _mask(self, tokens: int, hidden: Tensor) -> Tensor | None:
        """None where the window hides nothing: attention is causal by itself then, and faster. Written out in
        full it is told what to add to each score."""
        window = min(self.window or tokens, tokens)
        if self.family.attention == "eager":
            return _added(tokens, window, hidden.device, hidden.dtype)
        return None if window == tokens else _windowed(tokens, window, hidden.device)

    def _culprit(self, hidden: Tensor) -> str:
        """Full name of the first submodule that puts out NaN or infinity."""
        found: list[str] = []
        with watching(self.module, lambda name, output: _note_broken(found, name, output)), torch.no_grad():
            self._forward(hidden)
        return f"{self.name}.{found[0]}" if found else self.name


@contextmanager
def watching(module: nn.Module, see: Any) -> Iterator[None]:
    """`see(name, output)` for each submodule's tensor output, in order of computation."""

    def hook(name: str) -> Any:
        return lambda _module, _inputs, output: see(name, output)

    handles = [child.register_forward_hook(hook(name)) for name, child in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_broken(found: list[str], name: str, output: Any) -> None:
    if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
        found.append(name)


@lru_cache(maxsize=4)
def _windowed(tokens: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, tokens, tokens]: a position sees itself and the window - 1 before it."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None]
    return ((distance >= 0) & (distance < window))[None, None]


@lru_cache(maxsize=4)
def _added(tokens: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    seen = _windowed(tokens, window, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _check_tensors(block: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BadSource(f"the checkpoint has no tensor {block}.{missing[0]}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise BadSource(f"the checkpoint's tensor {block}.{extra[0]:.80} has no place in the model")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise BadSource(f"{block}.{name}: its shape is {shapes}")
        if not bool(torch.isfinite(tensor).all()):
            raise BadSource(f"{block}.{name}: it has NaN or infinite values")
