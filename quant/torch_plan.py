"""What a build of a torch format will do, from headers alone and without torch: bytes, memory, time."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from quant.checkpoint import TEXT_FILES
from quant.errors import BadRecipe
from quant.layout import Layout, read_layout
from quant.safetensors_header import DTYPE_BYTES, TensorInfo
from quant.scheme import Scheme
from quant.source import Source
from quant.text_choice import Text, choose_text
from quant.torch_recipe import TorchRecipe

PLAIN = "plain"
DTYPES: Mapping[str, str] = MappingProxyType({"bf16": "BF16", "f16": "F16", "f32": "F32"})
SMALL_BYTES = 1 << 16  # headers, index, report
BATCH_TOKENS: Mapping[str, int] = MappingProxyType({"cpu": 2048, "cuda": 16384})  # that a block sees at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """One linear."""

    module: str
    shape: tuple[int, int]  # out, in
    kept: bool
    scheme: Scheme | None  # None: kept, or the format's one way
    bytes: int  # of its tensors in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchPlan:
    layout: Layout
    modules: tuple[ModulePlan, ...]
    text: Text | None  # None: nothing is calibrated
    output_bytes: int
    scratch_bytes: int  # most that lies on the disk at once, the output included
    memory_bytes: int  # beside what the process holds before it begins
    device: str  # "cpu" or "cuda"
    seconds: float  # a rough guess

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """Of the modules that are quantized."""
        return {one.module: one.scheme for one in self.modules if not one.kept}


def plan_torch(source: Source, recipe: TorchRecipe, device: str = "auto") -> TorchPlan:
    """Raises BadRecipe or BadSource, naming the module, for what cannot be built."""
    _require_packages(recipe)
    if source.kind != "hf":
        raise BadRecipe(f"{recipe.name} needs a checkpoint in safetensors; the source is a GGUF file")
    layout = read_layout(source)
    device = likely_device() if device == "auto" else device
    modules = tuple(_module(name, weight, recipe) for name, weight in layout.linears)
    if recipe.format != PLAIN and all(one.kept for one in modules):
        raise BadRecipe("the recipe keeps every module as it is: there is nothing to quantize")
    text = choose_text(recipe.calibration, layout, device) if recipe.calibration else None
    output = _output_bytes(source, layout, modules, recipe)
    return TorchPlan(
        layout=layout,
        modules=modules,
        text=text,
        output_bytes=output,
        scratch_bytes=2 * output + 2 * _activation_bytes(layout, text),
        memory_bytes=_memory_bytes(layout, recipe, text, device),
        device=device,
        seconds=_seconds(layout, recipe, text, device),
    )


def likely_device() -> str:
    """Where torch will compute, without asking torch."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _require_packages(recipe: TorchRecipe) -> None:
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise BadRecipe(
                f"{recipe.name} needs {name}, which is not installed (the extra quantserve[torch])"
            )


def _module(name: str, weight: TensorInfo, recipe: TorchRecipe) -> ModulePlan:
    (rows, columns), dtype = weight.shape, weight.dtype
    scheme = "keep" if recipe.format == PLAIN else recipe.scheme_of(name)
    if scheme == "keep":
        size = rows * columns * DTYPE_BYTES[DTYPES[recipe.dtype] if recipe.dtype else dtype]
        return ModulePlan(module=name, shape=(rows, columns), kept=True, scheme=None, bytes=size)
    if why := _unfit(rows, columns, scheme, recipe.format):
        raise BadRecipe(f"{weight.said}: {why}")
    size = int(_BYTES[recipe.format](rows, columns, scheme or _NO_SCHEME, DTYPE_BYTES[dtype]))
    if recipe.format == "bnb4" and dict(recipe.options).get("double_quant") == 0:
        size += rows * columns // 64 * 3
    return ModulePlan(module=name, shape=(rows, columns), kept=False, scheme=scheme, bytes=size)


def _unfit(rows: int, columns: int, scheme: Scheme | None, format: str) -> str | None:
    """As the formats say it themselves when they are asked, but without torch."""
    if format == "bnb4" and columns % BNB4_BLOCK and columns % 16 == 0:
        return (
            f"bitsandbytes' kernels for CPUs misread rows of {columns:,} columns, "
            f"a multiple of 16 that is none of {BNB4_BLOCK}"
        )
    if scheme is None:
        return None
    if scheme.group and columns % scheme.group:
        return f"{columns:,} input columns do not divide into groups of {scheme.group}"
    each = 32 // scheme.bits
    if format == "gptq" and columns % each:
        return f"gptq packs {each} codes along the input; {columns:,} columns are no multiple of that"
    if format in {"gptq", "awq"} and rows % each:
        return f"{format} packs {each} codes along the output; {rows:,} rows are no multiple of that"
    return None


BNB4_BLOCK = 64  # weights that share a scale
_NO_SCHEME = Scheme(bits=4)
Bytes = Callable[[int, int, Scheme, int], float]  # rows, columns, scheme, bytes of a source's number


def _pack_quantized(rows: int, columns: int, scheme: Scheme, width: int) -> float:
    words = -(-columns * scheme.bits // 32) * rows
    zeros = 0 if scheme.symmetric else -(-rows * scheme.bits // 32) * scheme.groups(columns)
    return 4 * (words + zeros) + rows * scheme.groups(columns) * width + 16


def _awq(rows: int, columns: int, scheme: Scheme, _: int) -> float:
    groups = scheme.groups(columns)
    return (columns + groups) * rows * scheme.bits / 8 + 2 * groups * rows


def _gptq(rows: int, columns: int, scheme: Scheme, _: int) -> float:
    return _awq(rows, columns, scheme, _) + 4 * columns


def _bnb4(rows: int, columns: int, _: Scheme, __: int) -> float:
    blocks = -(-rows * columns // 64)
    return rows * columns / 2 + blocks + -(-blocks // 256) * 4 + 4 * 256 + 4 * 16 + 200


_BYTES: Mapping[str, Bytes] = MappingProxyType(
    {
        "compressed-tensors": _pack_quantized,
        "compressed-tensors-int8": lambda rows, columns, _, width: rows * columns + rows * width,
        "awq": _awq,
        "gptq": _gptq,
        "bnb4": _bnb4,
        "bnb8": lambda rows, columns, *_: rows * columns + 4 * rows + 1,
    }
)


def _output_bytes(
    source: Source, layout: Layout, modules: tuple[ModulePlan, ...], recipe: TorchRecipe
) -> int:
    weights = {f"{one.module}.weight" for one in modules}
    width = DTYPE_BYTES[DTYPES[recipe.dtype]] if recipe.dtype else None
    others = sum(
        tensor.elements * (width or DTYPE_BYTES[tensor.dtype])
        for tensor in layout.tensors
        if tensor.name not in weights
    )
    texts = sum(path.stat().st_size for name in TEXT_FILES if (path := source.path / name).exists())
    return sum(one.bytes for one in modules) + others + texts + SMALL_BYTES + 512 * len(modules)


def _activation_bytes(layout: Layout, text: Text | None) -> int:
    return 0 if text is None else text.samples * text.length * layout.hidden * 4


def _memory_bytes(layout: Layout, recipe: TorchRecipe, text: Text | None, device: str) -> int:
    """One block in the computing type with a copy of its largest group, its Hessians, one batch."""
    if recipe.format == PLAIN:
        return max(tensor.elements for tensor in layout.tensors) * 8
    width = 4 if device == "cpu" else 2
    shapes = [weight.shape for _, weight in layout.linears][: len(layout.family.linears)]
    block = sum(rows * columns for rows, columns in shapes)
    largest = max(rows * columns for rows, columns in shapes)
    needed = block * width + 3 * 4 * largest
    if text is None:
        return needed
    wide = max(max(shape) for shape in shapes)
    columns = max(columns for _, columns in shapes)
    tokens = max(BATCH_TOKENS[device], text.length)
    return needed + 4 * 4 * columns * columns + 4 * tokens * wide * width


# Passes over the weights for each token, by method; multiplications and additions a second, of a CPU's core.
_PASSES: Mapping[str, float] = MappingProxyType(
    {"gptq": 6, "awq": 40, "awq+gptq": 46, "smoothquant": 20, "best": 700}
)
_SPEED: Mapping[str, float] = MappingProxyType({"cpu": 6e10, "cuda": 1.5e14})
_WRITING = 0.15  # of that speed is reached by writing text, one token of all rows at a time
_BYTES_A_SECOND = 3e8


def _seconds(layout: Layout, recipe: TorchRecipe, text: Text | None, device: str) -> float:
    shapes = [weight.shape for _, weight in layout.linears]
    weights = sum(rows * columns for rows, columns in shapes)
    seconds = 2 * weights / _BYTES_A_SECOND
    if text is None:
        return seconds
    tokens = text.samples * text.length
    work = 2.0 * weights * tokens * _PASSES.get(recipe.method, 40)
    if "gptq" in recipe.method or recipe.method == "best":
        work += sum(2.0 * tokens * columns**2 + columns**3 + rows * columns**2 for rows, columns in shapes)
    if text.kind == "self":
        work += 2.0 * layout.elements * tokens / _WRITING
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    return seconds + work / (_SPEED[device] * cores)


def grouped(plan: TorchPlan) -> Iterator[tuple[str, int, ModulePlan, int]]:
    """(name below the block, how many are alike, one of them, bytes of all), in the order of computation."""
    alike: dict[tuple[str, tuple[int, int], bool, Scheme | None], list[ModulePlan]] = {}
    for one in plan.modules:
        short = one.module.removeprefix(plan.layout.family.blocks + ".").partition(".")[2]
        alike.setdefault((short, one.shape, one.kept, one.scheme), []).append(one)
    for (short, *_), those in alike.items():
        yield short, len(those), those[0], sum(one.bytes for one in those)
