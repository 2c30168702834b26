"""A Hugging Face checkpoint as one GGUF file, tensor by tensor, without a model in memory.

Everything that can be refused is refused before the target exists. The same source gives the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource
from quant.files import disk_full_is_typed
from quant.ggml import FILE_TYPES, TENSOR_TYPES
from quant.gguf import floats
from quant.gguf.layout import EMBEDDING, FLOATS, HEAD, SHARED_WIDTH, Constant, Copied, Planned, plan
from quant.gguf.shape import Shape, read_shape
from quant.gguf.tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from quant.safetensors_header import TensorInfo
from quant.source import Source

FloatType = Literal["f32", "f16", "bf16"]
SLAB = 32 * 2**20  # bytes of a tensor in memory at once


@dataclass(frozen=True, kw_only=True)
class Conversion:
    shape: Shape
    vocabulary: Vocabulary
    tensors: tuple[Planned, ...]


def convert(
    source: Source, target: Path, *, float_type: FloatType, progress: Callable[[int, int], None]
) -> None:
    """Write `target`; 2-D tensors become `float_type`, vectors F32. `progress(bytes written, bytes in all)`.

    Raises UnsupportedArchitecture, BadSource (a tensor with NaN or infinity is named) or DiskFull.
    """
    conversion = prepare(source)
    writer = gguf.GGUFWriter(path=None, arch=conversion.shape.graph.arch)
    writer.add_name(_name(conversion))
    _write_shape(conversion.shape, writer)
    writer.add_file_type(FILE_TYPES[float_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_vocabulary(conversion.vocabulary, writer)
    for tensor in conversion.tensors:
        _announce(tensor, float_type, writer)
    with disk_full_is_typed():
        try:
            writer.write_header_to_file(target)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(conversion.tensors, float_type, writer, progress)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            writer.close()


def prepare(source: Source) -> Conversion:
    """All that follows from the files' headers. Raises UnsupportedArchitecture or BadSource."""
    shape = read_shape(source.architecture, source.config)
    infos = checkpoint_tensors(source.path)
    tensors = plan(shape, infos, with_head=_has_own_head(shape, infos))
    return Conversion(
        shape=shape,
        vocabulary=read_vocabulary(source.path, source.config, shape.vocab),
        tensors=tensors,
    )


def _has_own_head(shape: Shape, infos: Mapping[str, TensorInfo]) -> bool:
    """As transformers: what the config calls tied is not when the checkpoint holds two different tensors."""
    if not shape.tied:
        return True
    head, embedding = infos.get(HEAD), infos.get(EMBEDDING)
    return head is not None and embedding is not None and not _equal(head, embedding)


def _equal(left: TensorInfo, right: TensorInfo) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    pairs = zip(_bytes(left), _bytes(right), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _bytes(info: TensorInfo) -> Iterator[npt.NDArray[np.uint8]]:
    stored = np.memmap(info.file, mode="r", dtype=np.uint8)
    for start in range(info.start, info.end, SLAB):
        yield stored[start : min(start + SLAB, info.end)]


def _name(conversion: Conversion) -> str:
    """Not the folder's: equal sources make equal files. Where it says "phi3", llama.cpp strips spaces behind
    special tokens."""
    name = conversion.shape.architecture
    return name if conversion.vocabulary.strips else name.replace("Phi3", "Phi 3")


def _write_shape(shape: Shape, writer: gguf.GGUFWriter) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    if shape.family.layer_norm:
        writer.add_layer_norm_eps(shape.epsilon)
    else:
        writer.add_layer_norm_rms_eps(shape.epsilon)
    _write_rope(shape, writer)
    _write_layers(shape, writer)
    for key, value in shape.numbers.items():
        writer.add_float32(key.format(arch=shape.graph.arch), value)
    if shape.experts_used:
        _write_experts(shape, writer)


def _write_layers(shape: Shape, writer: gguf.GGUFWriter) -> None:
    """In what layers differ."""
    if shape.window is not None:
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern(list(shape.windowed))
    if shape.turned and shape.graph.sinks:
        writer.add_array(f"{shape.graph.arch}.attention.rope_pattern", list(shape.turned))
    if shape.local_theta is not None:
        writer.add_rope_freq_base_swa(shape.local_theta)


def _write_experts(shape: Shape, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(shape.sizes["experts"])
    writer.add_expert_used_count(shape.experts_used)
    writer.add_expert_feed_forward_length(shape.sizes["expert"])
    if shape.graph.shares_expert:
        writer.add_expert_shared_feed_forward_length(SHARED_WIDTH)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
        writer.add_expert_weights_norm(shape.normalized)


def _write_rope(shape: Shape, writer: gguf.GGUFWriter) -> None:
    rope = shape.rope
    writer.add_rope_dimension_count(rope.dimensions or shape.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.scaling))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    if rope.attention != 1.0:
        writer.add_rope_scaling_attn_factors(rope.attention)


def _announce(tensor: Planned, float_type: FloatType, writer: gguf.GGUFWriter) -> None:
    kind = _stored_as(tensor, float_type)
    count = int(np.prod(tensor.shape))
    number = TENSOR_TYPES[kind].number
    writer.add_tensor_info(
        tensor.name,
        tensor.shape,
        floats.STORED[kind],
        count * floats.STORED[kind].itemsize,
        gguf.GGMLQuantizationType(number),
    )


def _stored_as(tensor: Planned, float_type: FloatType) -> FloatType:
    return float_type if len(tensor.shape) > 1 else "f32"


def _write_tensors(
    tensors: tuple[Planned, ...],
    float_type: FloatType,
    writer: gguf.GGUFWriter,
    progress: Callable[[int, int], None],
) -> None:
    assert writer.fout is not None
    stream = writer.fout[0]
    sizes = [info.nbytes for info in writer.tensors[0].values()]
    done, total = 0, sum(sizes)
    writer.write_padding(stream, stream.tell())
    for tensor, size in zip(tensors, sizes, strict=True):
        for slab in _slabs(tensor, _stored_as(tensor, float_type)):
            stream.write(slab.tobytes())
            done += slab.nbytes
            progress(done, total)
        writer.write_padding(stream, size)


def _slabs(tensor: Planned, wanted: FloatType) -> Iterator[floats.Array]:
    match tensor:
        case Constant():
            numbers = np.broadcast_to(np.array(tensor.values, "<f4"), tensor.shape)
            yield floats.convert(np.ascontiguousarray(numbers), "f32", wanted)
        case Copied():
            yield from _copied_slabs(tensor, wanted)


def _copied_slabs(tensor: Copied, wanted: FloatType) -> Iterator[floats.Array]:
    """Some rows at a time; whole heads where rows are reordered."""
    rows, *rest = tensor.shape if len(tensor.infos) == 1 else tensor.shape[1:]
    unit = rows // tensor.heads if tensor.heads else 1
    step = max(1, SLAB // (unit * int(np.prod(rest)) * 4)) * unit
    for info in tensor.infos:
        kind = FLOATS[info.dtype]
        stored = np.memmap(
            info.file, mode="r", dtype=floats.STORED[kind], offset=info.start, shape=info.shape
        )
        for start in range(tensor.start, tensor.start + rows, step):
            slab = np.array(stored[start : min(start + step, tensor.start + rows)])
            try:
                converted = _scaled(slab, kind, wanted, tensor)
            except ValueError as error:
                raise BadSource(f"{info.said} {error}") from error
            yield _reorder(converted, unit) if tensor.heads else converted


def _scaled(slab: floats.Array, kind: str, wanted: FloatType, tensor: Copied) -> floats.Array:
    if (tensor.factor, tensor.offset) == (1.0, 0.0):
        return floats.convert(slab, kind, wanted)
    singles = floats.convert(slab, kind, "f32").astype(np.float64) * tensor.factor + tensor.offset
    return floats.convert(singles.astype("<f4"), "f32", wanted)


def _reorder(rows: floats.Array, head_dim: int) -> floats.Array:
    """Row i of a head's first half becomes row 2i, row i of the second half row 2i + 1."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
