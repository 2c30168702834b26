"""Which text a build calibrates on, decided from headers before anything is computed."""

from dataclasses import dataclass
from typing import Literal

from quant.errors import BadRecipe
from quant.layout import Layout
from quant.torch_recipe import Calibration

LENGTH = 512  # tokens of a sample, where the recipe names none
# What writing may cost: multiplications and additions (some minutes), and bytes of weights in memory.
MOST_WORK = {"cpu": 2e13, "cuda": 2e16}
MOST_WEIGHTS = {"cpu": 1 << 30, "cuda": 20 << 30}
WEIGHT_BYTES = {"cpu": 4, "cuda": 2}
Kind = Literal["self", "prompts", "corpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Which text it will be, decided before anything is computed."""

    kind: Kind
    samples: int
    length: int  # tokens of each
    seed: int = 0
    corpus: str | None = None
    note: str | None = None  # where it is not what the recipe asks for

    @property
    def said(self) -> str:
        what = {"self": "text that the source writes", "prompts": "the bundled prompts", "corpus": "a corpus"}
        return f"{self.samples} x {self.length} tokens of {what[self.kind]}"


def choose_text(calibration: Calibration, layout: Layout, device: str) -> Text:
    """`device`: "cpu" or "cuda". Raises BadRecipe for samples longer than the model's context."""
    length = calibration.length or min(LENGTH, layout.context)
    if length > layout.context:
        raise BadRecipe(
            f"calibration samples of {length:,} tokens exceed the model's context of {layout.context:,}"
        )
    kind, note = _kind(calibration, layout, length, device)
    return Text(
        kind=kind,
        samples=calibration.samples,
        length=length,
        seed=calibration.seed,
        corpus=calibration.corpus,
        note=note,
    )


def _kind(calibration: Calibration, layout: Layout, length: int, device: str) -> tuple[Kind, str | None]:
    if calibration.kind == "corpus":
        return "corpus", None
    work = 2.0 * layout.elements * calibration.samples * length
    weights = layout.elements * WEIGHT_BYTES[device]
    if work <= MOST_WORK[device] and weights <= MOST_WEIGHTS[device]:
        return "self", None
    return "prompts", (
        f"{layout.elements / 1e9:.1f} billion weights are too many to write {calibration.samples} x {length} "
        f"tokens with on {device}: the bundled prompts' text is used; a corpus may fit your use better"
    )
