"""What a build will do, decided before it writes: its key, what it is made of, the room it needs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from quant.canonical import canonical_digest
from quant.checkpoint import TEXT_FILES, checkpoint_tensors
from quant.errors import BadRecipe, DiskFull
from quant.files import folder_bytes
from quant.ggml import FLOAT_TYPES
from quant.gguf.header import read_header
from quant.recipe import SELF, GgufRecipe, Recipe, TorchRecipe
from quant.safetensors_header import TensorInfo
from quant.source import Source
from quant.store import VariantStore
from quant.torch_plan import plan_torch

# Raised when the same source and recipe give other bytes: of GGUF files, of the torch formats, and of some
# methods only.
BUILDER_VERSION, TORCH_BUILDER_VERSION = 1, 1
METHOD_VERSIONS: Mapping[str, int] = MappingProxyType({"gptq": 2, "awq+gptq": 2, "best": 2})
FloatType = Literal["f32", "f16", "bf16"]
REQUANTIZABLE = FLOAT_TYPES | {"q8_0"}
SPARE_BYTES = 1 << 20  # manifests, file system overhead


def variant_key(source: Source, recipe: Recipe) -> str:
    """32 hexadecimal digits that name the variant. Raises BadRecipe (imatrix or corpus gone)."""
    return canonical_digest([source.digest, recipe.digest, builder_version(recipe)])[:32]


def builder_version(recipe: Recipe) -> int:
    if isinstance(recipe, GgufRecipe):
        return BUILDER_VERSION
    return max(TORCH_BUILDER_VERSION, METHOD_VERSIONS.get(recipe.method, 1))


@dataclass(frozen=True, slots=True)
class Sizes:
    base: int  # bytes of the float GGUF that is quantized; 0 where there is none
    model: int  # bytes of model.gguf, rather too many than too few
    texts: int


def base_type(tensors: Iterable[TensorInfo]) -> FloatType:
    """The smallest type that holds every matrix exactly."""
    match {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}:
        case kinds if kinds == {"BF16"}:
            return "bf16"
        case kinds if kinds == {"F16"}:
            return "f16"
        case _:
            return "f32"


def require_buildable(source: Source, recipe: Recipe) -> None:
    """Raises BadRecipe, and BadSource for what headers show. Tensors for GGUF the converter judges."""
    if isinstance(recipe, TorchRecipe):
        plan_torch(source, recipe)
        return
    if source.kind == "hf":
        from quant.gguf.shape import (
            read_shape,
        )  # imports much, which a server that builds nothing need not hold

        read_shape(source.architecture, source.config)
        return
    if recipe.imatrix == SELF:
        raise BadRecipe("an imatrix is collected from a checkpoint; for a GGUF source, name an imatrix file")
    have = read_header(source.path).file_type
    if have not in REQUANTIZABLE:
        raise BadRecipe(
            f"the source is {have} already; only {', '.join(sorted(REQUANTIZABLE))} can be quantized"
        )
    if have == recipe.type:
        raise BadRecipe(f"the source is {have} already")


def sizes(source: Source, recipe: GgufRecipe) -> Sizes:
    if source.kind == "gguf":
        elements = sum(tensor.elements for tensor in read_header(source.path).tensors)
        return Sizes(0, _model_bytes(elements, recipe), 0)
    tensors = checkpoint_tensors(source.path).values()
    elements = sum(tensor.elements for tensor in tensors)
    texts = sum(path.stat().st_size for name in TEXT_FILES if (path := source.path / name).exists())
    base = 0 if recipe.type in FLOAT_TYPES else elements * (4 if base_type(tensors) == "f32" else 2)
    return Sizes(base, _model_bytes(elements, recipe), texts)


def require_room(source: Source, recipe: Recipe, store: VariantStore) -> None:
    """Raises DiskFull where the cache's disk cannot hold the build; deletes only what is in quarantine."""
    total = room_bytes(source, recipe)
    held = folder_bytes(store.scratch(variant_key(source, recipe)))
    free = store.free_bytes()
    if total - held > free and store.clear_quarantine():
        free = store.free_bytes()
    if total - held > free:
        raise DiskFull(f"the build needs {total - held:,} bytes, but {free:,} are free")


def room_bytes(source: Source, recipe: Recipe) -> int:
    """Most bytes that lie on the disk at once."""
    if isinstance(recipe, TorchRecipe):
        return plan_torch(source, recipe).scratch_bytes + SPARE_BYTES
    needed = sizes(source, recipe)
    return needed.base + needed.model + needed.texts + SPARE_BYTES


def _model_bytes(elements: int, recipe: GgufRecipe) -> int:
    """Mixtures hold some tensors in bigger types, and rows of odd lengths fall back to such."""
    if recipe.type == "f32" or recipe.overrides:
        return 4 * elements
    if recipe.type in FLOAT_TYPES:
        return 2 * elements + elements // 100  # vectors stay f32
    digit = re.search(r"\d", recipe.type)
    bits = min(int(digit[0]) + 2.5, 8.5) if digit else 8.5
    return int(elements * max(bits, 8.5 if digit and digit[0] == "8" else 0) / 8)
