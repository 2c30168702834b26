"""What a build would do, for people: modules and schemes, bytes, memory, time. Nothing is computed."""

from dataclasses import dataclass

from quant.errors import BadRecipe
from quant.gguf.header import read_header
from quant.layout import read_layout
from quant.plan import require_buildable, room_bytes, sizes, variant_key
from quant.recipe import GgufRecipe, Recipe
from quant.scheme import Scheme
from quant.source import Source
from quant.torch_plan import ModulePlan, TorchPlan, grouped, plan_torch
from quant.torch_recipe import TorchRecipe

GGUF_BYTES_A_SECOND = 3e7  # of the source, by llama.cpp on two cores
SLAB_BYTES = 512 << 20  # of a tensor that llama.cpp has in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """Linears that are alike."""

    name: str  # below the block; "all matrices" of a GGUF file
    count: int
    shape: tuple[int, int] | None  # out, in
    scheme: str  # "W4 g128 symmetric", "nf4", "q4_k_m", "kept"
    bytes: int  # of all of them in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    key: str
    recipe: str
    method: str
    format: str
    rows: tuple[PlanRow, ...]
    modules: tuple[ModulePlan, ...]  # one by one; none for GGUF, where llama.cpp decides
    elements: int  # weights of the source
    output_bytes: int
    scratch_bytes: int  # most that lies on the disk at once, the output included
    memory_bytes: int  # beside what the process holds before it begins
    seconds: float  # a rough guess
    device: str  # "cpu" or "cuda"
    text: str | None  # what is calibrated on
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.output_bytes / self.elements


def plan_build(source: Source, recipe: Recipe, *, device: str = "auto") -> BuildPlan:
    """Raises what the build would, where headers show it: BadRecipe, BadSource and its kinds."""
    if device not in {"auto", "cpu", "cuda"}:
        raise BadRecipe(f"device is auto, cpu or cuda, not {device!r:.40}")
    require_buildable(source, recipe)
    if isinstance(recipe, GgufRecipe):
        return _of_gguf(source, recipe)
    return _of_torch(source, recipe, plan_torch(source, recipe, device))


def _of_torch(source: Source, recipe: TorchRecipe, plan: TorchPlan) -> BuildPlan:
    rows = tuple(
        PlanRow(name=name, count=count, shape=one.shape, scheme=_scheme(one, recipe), bytes=size)
        for name, count, one, size in grouped(plan)
    )
    return BuildPlan(
        key=variant_key(source, recipe),
        recipe=recipe.name,
        method=recipe.method,
        format=recipe.format,
        rows=rows,
        modules=plan.modules,
        elements=plan.layout.elements,
        output_bytes=plan.output_bytes,
        scratch_bytes=plan.scratch_bytes,
        memory_bytes=plan.memory_bytes,
        seconds=plan.seconds,
        device=plan.device,
        text=plan.text.said if plan.text else None,
        notes=(plan.text.note,) if plan.text and plan.text.note else (),
    )


def _scheme(one: ModulePlan, recipe: TorchRecipe) -> str:
    if one.kept:
        return recipe.dtype or "kept"
    return described(one.scheme) if one.scheme else recipe.method


def described(scheme: Scheme) -> str:
    group = "channel" if scheme.group is None else f"g{scheme.group}"
    return f"W{scheme.bits} {group} {'symmetric' if scheme.symmetric else 'asymmetric'}"


def _of_gguf(source: Source, recipe: GgufRecipe) -> BuildPlan:
    if source.kind == "gguf":
        matrices = [tensor.elements for tensor in read_header(source.path).tensors if len(tensor.shape) > 1]
    else:
        matrices = [tensor.elements for tensor in read_layout(source).tensors if len(tensor.shape) > 1]
    needed = sizes(source, recipe)
    row = PlanRow(
        name="all matrices", count=len(matrices), shape=None, scheme=recipe.type, bytes=needed.model
    )
    return BuildPlan(
        key=variant_key(source, recipe),
        recipe=recipe.name,
        method=recipe.method,
        format=recipe.format,
        rows=(row,),
        modules=(),
        elements=sum(matrices),
        output_bytes=needed.model + needed.texts,
        scratch_bytes=room_bytes(source, recipe),
        memory_bytes=min(4 * max(matrices), SLAB_BYTES) + 4 * max(matrices),
        seconds=2 * sum(matrices) / GGUF_BYTES_A_SECOND,
        device="cpu",
        text=None,
        notes=("llama.cpp mixes types and falls back where rows fit no block: bytes are a rough guess",),
    )
