"""Importance matrices: how strongly each input column of a linear is used.

Two layouts (llama.cpp: tools/imatrix, common/imatrix-loader.cpp): a GGUF file with `NAME.in_sum2` (sums of
squares) and `NAME.counts`, and the older one of records (name, calls, values): means times calls.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from quant.errors import BadRecipe
from quant.files import shown

Values = npt.NDArray[np.float32]
Importance = Mapping[str, Values]
MOST_ENTRIES = 1_000_000
LONGEST_NAME = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What an imatrix file holds, by name of a weight tensor of the GGUF file."""

    squares: Mapping[str, Values]  # for each input column the sum of its squares
    counts: Mapping[str, int]  # of tokens that were added up

    @property
    def importance(self) -> Importance:
        """The mean squares, as `read_imatrix` reads them from the file."""
        return {name: values / np.float32(self.counts[name]) for name, values in self.squares.items()}


def write_imatrix(path: Path, sums: Sums, *, text: str, chunk_tokens: int) -> None:
    """In llama.cpp's GGUF layout; same sums, same bytes. `text`: what it was collected from, in a word."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", max(sums.counts.values()) // chunk_tokens)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name, values in sums.squares.items():
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), sums.counts[name], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> Importance:
    """Mean squares by tensor name, one for each input column. Raises BadRecipe."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        entries = dict(_from_gguf(path) if magic == b"GGUF" else _from_records(path.read_bytes()))
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise BadRecipe(f"the imatrix file is damaged or no imatrix: {shown(str(error))}") from error
    if not entries:
        raise BadRecipe("the imatrix file has no entries")
    for name, values in entries.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise BadRecipe(f"the imatrix entry {shown(name)} holds values that are no mean squares")
    return entries


def _from_gguf(path: Path) -> Iterator[tuple[str, Values]]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        base = name.removesuffix(".in_sum2")
        if base == name:
            continue
        counts = np.asarray(tensors[f"{base}.counts"].data, np.float32).reshape(-1, 1)
        sums = np.array(tensor.data, np.float32).reshape(len(counts), -1)
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        yield base, means.ravel()


def _from_records(data: bytes) -> Iterator[tuple[str, Values]]:
    (entries,) = struct.unpack_from("<i", data)
    if not 0 < entries <= MOST_ENTRIES:
        raise ValueError(f"{entries} entries")
    at = 4
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length <= LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes")
        name = data[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if not 0 < count <= (len(data) - at) // 4:
            raise ValueError(f"{count} values")
        values = np.frombuffer(data, "<f4", count, at).astype(np.float32)
        at += 4 * count
        yield name, values / np.float32(calls) if calls > 0 else values
