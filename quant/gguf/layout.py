"""Which tensor of the checkpoint becomes which tensor of the GGUF file."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import gguf

from quant.errors import BadSource
from quant.files import shown
from quant.gguf.llama_graphs import ATTENTION, OWN_HEAD
from quant.gguf.shape import Shape
from quant.safetensors_header import TensorInfo

FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers of older transformers; the config says the same
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm"
SHARED_WIDTH = 256  # of an expert of zeros: a block of every type
NO_SINK = -1e30  # exp() of it is 0; llama.cpp's checks refuse infinity
Wanted = Mapping[str, tuple[int, ...]]  # shapes of the checkpoint's tensors by name


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Tensors of the checkpoint, or some rows of one: number * factor + offset.

    `heads` > 0: rows of each head are reordered for neighbouring pairs. Several tensors are stacked.
    """

    name: str
    infos: tuple[TensorInfo, ...]
    start: int = 0  # first row
    rows: int | None = None  # None: all
    heads: int = 0
    factor: float = 1.0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.infos[0].shape
        below = (rows if self.rows is None else self.rows, *rest)
        return below if len(self.infos) == 1 else (len(self.infos), *below)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A small vector that follows from the config, or a matrix of one number."""

    name: str
    values: tuple[float, ...]
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", (len(self.values),))


Planned = Copied | Constant


def plan(shape: Shape, tensors: Mapping[str, TensorInfo], *, with_head: bool) -> tuple[Planned, ...]:
    """Every tensor of the GGUF file in order. `with_head`: lm_head is a tensor of its own.

    Raises BadSource for a tensor that is missing, left over, no float, or not of the config's shape.
    """
    if with_head and OWN_HEAD not in shape.graph.abilities:
        raise BadSource(f"llama.cpp cannot compute {shape.architecture} with {OWN_HEAD}")
    expected = dict(_expected(shape, with_head))
    for name, wanted in expected.items():
        _check(name, tensors.get(name), wanted)
    for name in sorted(tensors.keys() - expected.keys() - {HEAD}):
        if not COMPUTED.search(name):
            raise BadSource(f"{tensors[name].said} has no place in this architecture")
    return (*_Plan(shape, tensors).tensors(expected, with_head), *_constants(shape))


def _expected(shape: Shape, with_head: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the checkpoint and their shapes, in the model's order."""
    yield EMBEDDING, (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        for name, wanted in _block(shape, layer):
            yield f"model.layers.{layer}.{name}", wanted
    yield from _norm(shape, NORM, (shape.hidden,))
    if with_head:
        yield HEAD, (shape.vocab, shape.hidden)


def _block(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    parts = shape.family.dense_block if layer in shape.dense else shape.family.block
    for module, names in parts.items():
        wanted = tuple(shape.sizes[name] for name in names)
        if len(wanted) == 1:
            yield from _norm(shape, module, wanted)
        elif len(wanted) == 2:
            yield f"{module}.weight", wanted
            if module in shape.biases:
                yield f"{module}.bias", wanted[:1]
        else:
            for expert in range(wanted[0]):
                yield f"{module.format(expert)}.weight", wanted[1:]


def _norm(shape: Shape, module: str, wanted: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{module}.weight", wanted
    if shape.family.layer_norm:
        yield f"{module}.bias", wanted


def _check(name: str, info: TensorInfo | None, wanted: tuple[int, ...]) -> None:
    if info is None:
        raise BadSource(f"the checkpoint has no tensor {name}")
    if info.shape != wanted:
        raise BadSource(f"{info.said} has shape {list(info.shape)}, but config.json implies {list(wanted)}")
    if info.dtype not in FLOATS:
        raise BadSource(f"{info.said} is {info.dtype}; only {', '.join(FLOATS)} are converted")


class _Plan:
    """Tensors of the checkpoint under their names in GGUF."""

    def __init__(self, shape: Shape, tensors: Mapping[str, TensorInfo]) -> None:
        self._shape = shape
        self._tensors = tensors
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        arch = known.get(shape.graph.arch, known[shape.graph.named_like])
        self._names = gguf.get_tensor_name_map(arch, shape.layers)
        self._head_normed = "self_attn.q_norm" in shape.family.block

    def tensors(self, expected: Wanted, with_head: bool) -> Iterator[Copied]:
        stacks: dict[str, list[TensorInfo]] = {}
        for name in expected:
            merged = re.sub(r"\.experts\.\d+\.", ".experts.", name)
            stacks.setdefault(merged, []).append(self._tensors[name])
        for name, infos in stacks.items():
            parts = self._parts(name)
            if len(infos) > 1 or not parts:
                yield self._copied(name, tuple(infos))
            for part, start, rows in parts:
                yield self._copied(part, tuple(infos), start, rows)
        if self._shape.graph.wants_head and not with_head:
            yield Copied(name="output.weight", infos=(self._tensors[EMBEDDING],))

    def _parts(self, name: str) -> list[tuple[str, int, int]]:
        """(name, first row, rows) of what lies in a fused matrix, for a graph that wants it apart."""
        prefix, kind = name.rpartition(".")[0], name.rpartition(".")[2]
        found, start = [], 0
        for fused, parts in self._shape.family.fused.items():
            if self._shape.graph.fused or not prefix.endswith(f".{fused}"):
                continue
            for part, size in parts:
                rows = self._shape.sizes[size]
                found.append((f"{prefix.removesuffix(fused)}{part}.{kind}", start, rows))
                start += rows
        return found

    def _copied(
        self, name: str, infos: tuple[TensorInfo, ...], start: int = 0, rows: int | None = None
    ) -> Copied:
        return Copied(
            name=self._name(name),
            infos=infos,
            start=start,
            rows=rows,
            heads=self._heads(name),
            factor=self._factor(name),
            offset=self._offset(name),
        )

    def _name(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        below = module.split(".", 3)[-1]
        if other := self._shape.graph.names.get(below):
            return f"blk.{module.split('.')[2]}.{other}.{kind}"
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise BadSource(f"tensor {shown(name)} has no name in GGUF")
        return str(found)

    def _heads(self, name: str) -> int:
        if not self._shape.graph.rotates_neighbours:
            return 0
        rotated = {ATTENTION[0]: self._shape.heads, ATTENTION[1]: self._shape.kv_heads}
        return next((heads for part, heads in rotated.items() if f".{part}." in name), 0)

    def _offset(self, name: str) -> float:
        norm = len(self._tensors[name].shape) == 1 if name in self._tensors else False
        added = self._shape.family.norm_offset if norm and name.endswith("norm.weight") else 0.0
        return added * self._factor(name)

    def _factor(self, name: str) -> float:
        scaled = ".self_attn.q_norm." if self._head_normed else f".{ATTENTION[0]}."
        return self._shape.query_factor if scaled in name else 1.0


def _constants(shape: Shape) -> Iterator[Constant]:
    rope, graph = shape.rope, shape.graph
    if rope.factors:
        yield Constant(name="rope_freqs.weight", values=rope.factors)
    if rope.long_factors:
        yield Constant(name="rope_factors_long.weight", values=rope.long_factors)
        yield Constant(name="rope_factors_short.weight", values=rope.short_factors)
    for layer in range(shape.layers):
        if graph.sinks:
            yield Constant(name=f"blk.{layer}.attn_sinks.weight", values=(NO_SINK,) * shape.heads)
        if graph.shares_expert and layer not in shape.dense:
            yield from _zero_expert(shape, layer)
        if graph.wants_biases:
            yield from _zero_biases(shape, layer)


def _zero_expert(shape: Shape, layer: int) -> Iterator[Constant]:
    inner, outer = (SHARED_WIDTH, shape.hidden), (shape.hidden, SHARED_WIDTH)
    for name, wanted in {"gate": inner, "up": inner, "down": outer}.items():
        yield Constant(name=f"blk.{layer}.ffn_{name}_shexp.weight", values=(0.0,), shape=wanted)


def _zero_biases(shape: Shape, layer: int) -> Iterator[Constant]:
    """Of linears that have none."""
    names = {"self_attn.o_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for module, name in names.items():
        if module not in shape.biases:
            rows = shape.sizes[shape.family.block[module][0]]
            yield Constant(name=f"blk.{layer}.{name}.bias", values=(0.0,) * rows)
