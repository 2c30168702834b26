"""Which tensor of the checkpoint becomes which tensor of the GGUF file."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import gguf

from quant.errors import BadSource
from quant.files import shown
from quant.gguf.families import ATTENTION, MLP, Shape
from quant.safetensors_header import TensorInfo

FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers of older transformers; the config says the same
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_SINK = -1e30  # exp() of it is 0; llama.cpp's checks refuse infinity


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A tensor of the checkpoint; `heads` > 0: rows of each head are reordered for neighbouring pairs."""

    name: str
    info: TensorInfo
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A small vector that follows from the config."""

    name: str
    values: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values),)


Planned = Copied | Constant


def plan(shape: Shape, tensors: Mapping[str, TensorInfo], *, with_head: bool) -> tuple[Planned, ...]:
    """Every tensor of the GGUF file in order. `with_head`: lm_head is a tensor of its own.

    Raises BadSource for a tensor that is missing, left over, no float, or not of the config's shape.
    """
    expected = dict(_expected(shape, with_head))
    for name, wanted in expected.items():
        _check(name, tensors.get(name), wanted)
    for name in sorted(tensors.keys() - expected.keys() - {HEAD}):
        if not COMPUTED.search(name):
            raise BadSource(f"tensor {shown(name)} has no place in this architecture")
    names = gguf.get_tensor_name_map(_NAMES.get(shape.graph.arch, gguf.MODEL_ARCH.LLAMA), shape.layers)
    copied = [_copied(names, shape, tensors[name]) for name in expected]
    return (*copied, *_constants(shape))


_NAMES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def _expected(shape: Shape, with_head: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the checkpoint and their shapes, in the model's order."""
    yield EMBEDDING, (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        for name, wanted in _block(shape):
            yield f"model.layers.{layer}.{name}", wanted
    yield "model.norm.weight", (shape.hidden,)
    if with_head:
        yield HEAD, (shape.vocab, shape.hidden)


def _block(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = dict(
        zip(
            ATTENTION + MLP,
            (queries, keys, keys, shape.hidden, shape.ffn, shape.ffn, shape.hidden),
            strict=True,
        )
    )
    columns = {"self_attn.o_proj": queries, "mlp.down_proj": shape.ffn}
    yield "input_layernorm.weight", (shape.hidden,)
    for linear in ATTENTION:
        yield from _linear(shape, linear, rows[linear], columns.get(linear, shape.hidden))
    if shape.qk_norm:
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)
    yield "post_attention_layernorm.weight", (shape.hidden,)
    for linear in MLP:
        yield from _linear(shape, linear, rows[linear], columns.get(linear, shape.hidden))


def _linear(shape: Shape, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if name in shape.biases:
        yield f"{name}.bias", (rows,)


def _check(name: str, info: TensorInfo | None, wanted: tuple[int, ...]) -> None:
    if info is None:
        raise BadSource(f"the checkpoint has no tensor {name}")
    if info.shape != wanted:
        raise BadSource(f"tensor {name} has shape {list(info.shape)}, but config.json implies {list(wanted)}")
    if info.dtype not in FLOATS:
        raise BadSource(f"tensor {name} is {info.dtype}; only {', '.join(FLOATS)} are converted")


def _copied(names: gguf.TensorNameMap, shape: Shape, info: TensorInfo) -> Copied:
    name = names.get_name(info.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise BadSource(f"tensor {shown(info.name)} has no name in GGUF")
    heads = 0
    if shape.graph.rotates_neighbours:
        heads = next((n for part, n in _rotated(shape).items() if f".{part}." in info.name), 0)
    return Copied(name=name, info=info, heads=heads)


def _rotated(shape: Shape) -> Mapping[str, int]:
    return {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}


def _constants(shape: Shape) -> Iterator[Constant]:
    if shape.rope.factors:
        yield Constant(name="rope_freqs.weight", values=shape.rope.factors)
    if shape.window is not None:
        for layer in range(shape.layers):
            yield Constant(name=f"blk.{layer}.attn_sinks.weight", values=(NO_SINK,) * shape.heads)
