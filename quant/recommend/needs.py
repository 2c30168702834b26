"""What is wanted of a device, and what a preset would take of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quant.errors import BadRecipe

KV_BYTES = 2  # of a number: 16-bit floats
CUDA_BYTES = 640 << 20  # what CUDA, its libraries and their workspaces take on the device
# Most mean KL divergence (nats a token, on the model that the presets' figures are from) that a task bears.
TASKS: Mapping[str, float] = MappingProxyType({"chat": 0.07, "code": 0.02, "extract": 0.008, "draft": 0.2})


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    memory: int  # bytes of the device
    context: int | None  # tokens of one request; None: the model's
    parallel: int
    task: str = "chat"
    device: str = "cpu"  # or "cuda"

    def check(self, longest: int) -> None:
        """Raises BadRecipe for an unknown task or device, or more context than the model has."""
        if self.device not in {"cpu", "cuda"}:
            raise BadRecipe(f"device is auto, cpu or cuda, not {self.device!r:.40}")
        if self.task not in TASKS:
            raise BadRecipe(f"no task {self.task!r:.40}; known: {', '.join(TASKS)}")
        if self.context is not None and self.context > longest:
            raise BadRecipe(f"a context of {self.context:,} tokens; the model's is {longest:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One preset; bytes throughout."""

    preset: str
    format: str
    codes: int
    scales: int  # with zero points and other tables
    kept: int  # norms, biases, and in the torch formats the embedding and the head
    kv: int
    overhead: int
    loss: float  # mean KL divergence, see TASKS; infinite where it is not known
    build: str  # what it costs to make
    fallen_back: int = 0  # weights whose rows fit no block of their type

    @property
    def weights(self) -> int:
        return self.codes + self.scales + self.kept

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.overhead

    def fits(self, need: Need) -> bool:
        return self.total <= need.memory

    def near_enough(self, need: Need) -> bool:
        return self.loss <= TASKS[need.task]

    def place(self, need: Need) -> tuple[bool, bool, float]:
        """Sorts the best first: those near enough to their source for the task, smallest first (decoding is
        bound by bytes read); then the others, nearest first; last those that do not fit."""
        near = self.near_enough(need)
        return not self.fits(need), not near, self.total if near else self.loss
