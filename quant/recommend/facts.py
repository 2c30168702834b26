"""What counts of a model, from the headers of a checkpoint or of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource
from quant.gguf.header import GgufHeader, read_header
from quant.gguf.layout import HEAD, Copied, plan
from quant.gguf.mixture import Stack
from quant.gguf.shape import read_shape
from quant.recommend.needs import KV_BYTES, Need
from quant.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Weights by GGUF's names, as (rows, columns)."""

    weights: Mapping[str, tuple[int, int]]
    vectors: int  # numbers in norms and biases, which GGUF files keep in 32 bits
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocabulary: int
    context: int
    stack: Stack
    stored: str | None = None  # the type that a GGUF source has already
    stored_bytes: int = 0

    @property
    def parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.weights.values()) + self.vectors

    def kv(self, need: Need) -> int:
        """Keys and values of all requests at their longest."""
        tokens = (need.context or self.context) * need.parallel
        return 2 * self.layers * self.kv_heads * self.head_dim * KV_BYTES * tokens


def read_facts(source: Source) -> Facts:
    """Raises BadSource."""
    return _of_gguf(read_header(source.path)) if source.kind == "gguf" else _of_checkpoint(source)


def _of_checkpoint(source: Source) -> Facts:
    shape, tensors = read_shape(source.architecture, source.config), checkpoint_tensors(source.path)
    planned = [
        tensor
        for tensor in plan(shape, tensors, with_head=not shape.tied and HEAD in tensors)
        if isinstance(tensor, Copied)
    ]
    return Facts(
        weights={one.name: (one.shape[0], one.shape[1]) for one in planned if len(one.shape) == 2},
        vectors=sum(one.shape[0] for one in planned if len(one.shape) == 1),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden,
        ffn=shape.ffn,
        vocabulary=shape.vocab,
        context=shape.context,
        stack=Stack(layers=shape.layers, shared_heads=shape.heads // shape.kv_heads, tied=shape.tied),
    )


def _of_gguf(header: GgufHeader) -> Facts:
    heads = _number(header, "attention.head_count")
    kv_heads = _number(header, "attention.head_count_kv", heads)
    hidden, layers = _number(header, "embedding_length"), _number(header, "block_count")
    weights = {one.name: (one.shape[1], one.shape[0]) for one in header.tensors if len(one.shape) == 2}
    if "token_embd.weight" not in weights:
        raise BadSource("the GGUF file has no tensor token_embd.weight")
    return Facts(
        weights=weights,
        vectors=sum(one.elements for one in header.tensors if len(one.shape) != 2),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=_number(header, "attention.key_length", max(1, hidden // heads)),
        hidden=hidden,
        ffn=_number(header, "feed_forward_length"),
        vocabulary=weights["token_embd.weight"][0],
        context=_number(header, "context_length"),
        stack=Stack(
            layers=layers, shared_heads=max(1, heads // kv_heads), tied="output.weight" not in weights
        ),
        stored=header.file_type,
        stored_bytes=sum(one.end - one.start for one in header.tensors),
    )


def _number(header: GgufHeader, key: str, otherwise: int | None = None) -> int:
    name = f"{header.architecture}.{key}"
    value: Any = header.metadata.get(name, otherwise)
    if type(value) is not int or value <= 0:
        raise BadSource(f"the GGUF file's {name} is no whole number above 0")
    return value
