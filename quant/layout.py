"""Where a checkpoint's modules lie, from config and headers alone: what torch formats are planned with."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource
from quant.families import QKV, Family, family_of
from quant.files import shown
from quant.safetensors_header import TensorInfo
from quant.source import Source

FLOATS = ("BF16", "F16", "F32")
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers of older transformers; the config says the same
SHORTEST_CONTEXT = 2048  # tokens of a model whose config names none


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    family: Family
    hidden: int
    context: int  # tokens
    blocks: tuple[Mapping[str, TensorInfo], ...]  # tensors of each block by name below it
    before: tuple[TensorInfo, ...]  # embedding
    after: tuple[TensorInfo, ...]  # final norm, and a head of its own

    @property
    def embedding(self) -> TensorInfo:
        return self.before[0]

    @property
    def linears(self) -> Iterator[tuple[str, TensorInfo]]:
        """(full name of the module, its weight), in the order of computation."""
        for index, block in enumerate(self.blocks):
            for name in self.family.linears:
                yield f"{self.family.block_name(index)}.{name}", block[f"{name}.weight"]

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """In the order in which they are written."""
        yield from self.before
        for block in self.blocks:
            yield from block.values()
        yield from self.after

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """Of the weights of the linears; which "BF16", "F16" or "F32" hold all of them exactly."""
        kinds = {weight.dtype for _, weight in self.linears}
        return kinds.pop() if len(kinds) == 1 else "F32"


def read_layout(source: Source) -> Layout:
    """Raises UnsupportedArchitecture, or BadSource naming what is missing, left over or of another shape."""
    family = family_of(source.architecture).of(source.config)
    _refuse_quantized(source)
    tensors = {n: t for n, t in checkpoint_tensors(source.path).items() if not COMPUTED.search(n)}
    for tensor in tensors.values():
        if tensor.dtype not in FLOATS:
            raise BadSource(f"{tensor.said} is {tensor.dtype}; only {', '.join(FLOATS)} are quantized")
    hidden = _integer(source, "hidden_size")
    embedding = _take(tensors, f"{family.embedding}.weight", (_integer(source, "vocab_size"), hidden))
    norm = [_take(tensors, f"{family.final_norm}.weight", (hidden,))]
    if family.norm_bias:
        norm.append(_take(tensors, f"{family.final_norm}.bias", (hidden,)))
    head = tensors.pop(f"{family.head}.weight", None)
    if head is None and not source.config.get("tie_word_embeddings", False):
        raise BadSource(f"the checkpoint has no tensor {family.head}.weight")
    blocks = tuple(_block(tensors, family, n) for n in range(_integer(source, "num_hidden_layers")))
    if tensors:
        raise BadSource(f"{tensors[min(tensors)].said} has no place in this architecture")
    _check_blocks(family, blocks, hidden)
    _check_heads(source, blocks[0], hidden)
    return Layout(
        family=family,
        hidden=hidden,
        context=_integer(source, "max_position_embeddings", SHORTEST_CONTEXT),
        blocks=blocks,
        before=(embedding,),
        after=(*norm,) if head is None else (*norm, head),
    )


def _refuse_quantized(source: Source) -> None:
    if source.config.get("quantization_config") is not None:
        raise BadSource("config.json has a quantization_config: name the full-precision checkpoint instead")


def _integer(source: Source, key: str, otherwise: int | None = None) -> int:
    value = source.config.get(key, otherwise)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise BadSource(f"config.json: {key} must be a whole number above 0, not {shown(value)}")
    return value


def _take(tensors: dict[str, TensorInfo], name: str, shape: tuple[int, ...]) -> TensorInfo:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise BadSource(f"the checkpoint has no tensor {name}")
    if tensor.shape != shape:
        raise BadSource(
            f"{tensor.said} has shape {list(tensor.shape)}, but config.json implies {list(shape)}"
        )
    return tensor


def _block(tensors: dict[str, TensorInfo], family: Family, index: int) -> dict[str, TensorInfo]:
    """The block's tensors, taken from `tensors`: first the linears in the order of computation."""
    prefix = family.block_name(index) + "."
    names = [name for name in tensors if name.startswith(prefix)]
    order = {name: place for place, name in enumerate(family.linears)}
    names.sort(key=lambda name: (order.get(name.removeprefix(prefix).rpartition(".")[0], len(order)), name))
    block = {name.removeprefix(prefix): tensors.pop(name) for name in names}
    for linear in family.linears:
        weight = block.get(f"{linear}.weight")
        if weight is None:
            raise BadSource(f"the checkpoint has no tensor {prefix}{linear}.weight")
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise BadSource(f"{weight.said} has shape {list(weight.shape)}, which is no matrix")
    return block


def _check_blocks(family: Family, blocks: tuple[Mapping[str, TensorInfo], ...], hidden: int) -> None:
    """All blocks look like the first, and the first reads and writes hidden states."""
    expected = {name: tensor.shape for name, tensor in blocks[0].items()}
    for index, block in enumerate(blocks):
        if odd := sorted(block.keys() ^ expected.keys()):
            raise BadSource(f"{family.block_name(index)} and block 0 differ in tensor {shown(odd[0])}")
        for name, tensor in block.items():
            if tensor.shape != expected[name]:
                raise BadSource(
                    f"{tensor.said} has shape {list(tensor.shape)}, in block 0 {list(expected[name])}"
                )
    for name in family.shared_inputs[0]:
        if expected[f"{name}.weight"][1] != hidden:
            weight = blocks[0][f"{name}.weight"]
            raise BadSource(
                f"{weight.said} has {weight.shape[1]:,} columns, but config.json's hidden_size is {hidden:,}"
            )


def _check_heads(source: Source, block: Mapping[str, TensorInfo], hidden: int) -> None:
    """Queries, keys and values of a layer that has a matrix for each are as many as config.json says."""
    heads = _integer(source, "num_attention_heads")
    kv_heads = _integer(source, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise BadSource("config.json: num_attention_heads must be a multiple of num_key_value_heads")
    size = hidden // heads if source.config.get("head_dim") is None else _integer(source, "head_dim")
    for name, count in zip(QKV, (heads, kv_heads, kv_heads), strict=True):
        weight = block.get(f"{name}.weight")
        wanted = (count * size, hidden)
        if weight is not None and weight.shape != wanted:
            raise BadSource(
                f"{weight.said} has shape {list(weight.shape)}, but config.json implies {list(wanted)}"
            )
