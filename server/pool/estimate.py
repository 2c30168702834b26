"""What an engine will hold, before it is loaded: from headers and sizes, rather too much than too little.

What an engine really held is remembered (`learned.py`) and then counts instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.files import folder_bytes, read_json
from quant.gguf.header import GgufHeader, read_header

RAM = "ram"
MIB = 1 << 20
CONFIG_LIMIT = 1 << 22  # bytes
PAGE = 256  # KV memory is given out in such units

ENGINE = {"llama": 44 * MIB, "toy-rows": 48 * MIB, "toy-pages": 48 * MIB}  # Python and the backend's library
TORCH = 420 * MIB  # with torch and transformers
CUDA_CONTEXT = 600 * MIB  # of the GPU's memory, before the first tensor
STEP_TOKENS = 256
OUTPUT_BYTES = 64 * MIB  # most of one pass's logits
FLOATS = frozenset({"f32", "f16", "bf16"})  # types that llama.cpp computes with as they lie in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """How much an engine is asked to hold."""

    backend: str
    context: int
    parallel: int
    kv_tokens: int | None

    @property
    def tokens(self) -> int:
        per_slot = -(-self.context // PAGE) * PAGE
        return self.kv_tokens or per_slot * self.parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a decoder; 0 where a file does not say."""

    layers: int
    kv_width: int  # numbers of keys, or values, of one token in one layer
    hidden: int
    vocabulary: int


def vocabulary(path: Path) -> int:
    """Tokens; 0 where a file does not say. Raises BadSource, OSError."""
    file = path / "model.gguf" if path.is_dir() and (path / "model.gguf").exists() else path
    if file.suffix == ".gguf":
        return shape_of_gguf(read_header(file)).vocabulary
    return shape_of_config(read_json(path / "config.json", CONFIG_LIMIT)).vocabulary


def estimate(path: Path, holding: Holding, *, gpu: str | None) -> dict[str, int]:
    """Bytes by device. `gpu`: the one that torch would take. Raises BadSource, OSError."""
    if holding.backend.startswith("toy"):
        return {RAM: ENGINE[holding.backend]}
    if holding.backend == "llama" or path.suffix == ".gguf":
        return {RAM: _of_gguf(path / "model.gguf" if path.is_dir() else path, holding)}
    return _of_folder(path, holding, gpu)


def _of_gguf(file: Path, holding: Holding) -> int:
    """The file, with all its parts, is mapped; types that are repacked for the processor are held twice."""
    header = read_header(file)
    packed = sum(tensor.end - tensor.start for tensor in header.tensors if tensor.type not in FLOATS)
    shape = shape_of_gguf(header)
    number = 4 if header.file_type == "f32" else 2
    kv = 2 * shape.layers * shape.kv_width * number * holding.tokens
    outputs = min(OUTPUT_BYTES, 4 * shape.vocabulary * max(holding.parallel, STEP_TOKENS))
    passing = 4 * STEP_TOKENS * (8 * shape.hidden) + outputs // 4
    return header.bytes + packed + kv + passing + ENGINE["llama"]


def _of_folder(folder: Path, holding: Holding, gpu: str | None) -> dict[str, int]:
    shape = shape_of_config(read_json(folder / "config.json", CONFIG_LIMIT))
    size = folder_bytes(folder)
    kv = 2 * shape.layers * shape.kv_width * holding.tokens
    passing = 4 * STEP_TOKENS * (8 * shape.hidden + shape.vocabulary)
    if gpu is not None:
        return {gpu: size + 2 * kv + passing + CUDA_CONTEXT, RAM: TORCH + size // 4}
    # a CPU computes in float32 and unpacks weights once; at most 4 bits became 32
    return {RAM: 8 * size + 4 * kv + passing + TORCH}


def shape_of_gguf(header: GgufHeader) -> Shape:
    def number(name: str) -> int:
        value = header.metadata.get(f"{header.architecture}.{name}")
        return value if isinstance(value, int) and value > 0 else 0

    heads, hidden = number("attention.head_count"), number("embedding_length")
    kv_heads = number("attention.head_count_kv") or heads
    head = number("attention.key_length") or (hidden // heads if heads else 0)
    vocabulary = max(
        (math.prod(t.shape[1:]) for t in header.tensors if t.name == "token_embd.weight"), default=0
    )
    return Shape(layers=number("block_count"), kv_width=kv_heads * head, hidden=hidden, vocabulary=vocabulary)


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Raises BadSource."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise BadSource("config.json: text_config is no object")

    def number(name: str) -> int:
        value = text.get(name)
        return value if isinstance(value, int) and value > 0 else 0

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    kv_heads = number("num_key_value_heads") or heads
    head = number("head_dim") or (hidden // heads if heads else 0)
    return Shape(
        layers=number("num_hidden_layers"),
        kv_width=kv_heads * head,
        hidden=hidden,
        vocabulary=number("vocab_size"),
    )
