"""What `Open.options` may say to the backends that compute with torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from server.errors import OpenError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "f32", "bf16", "f16")
WEIGHTS = ("auto", "dense", "packed")


@dataclass(frozen=True)
class Options:
    device: str = "auto"  # auto: cuda where there is one
    dtype: str = "auto"  # activations, KV and weights that are not quantized
    weights: str = "auto"  # packed: as stored; dense: quantized weights are unpacked while they are loaded
    slots: int | None = None  # sequences held, running and cached; None: chosen from `parallel`
    step_tokens: int | None = None  # in one forward pass
    depth: int | None = None  # steps in flight; None: 2 on a GPU, 1 on a CPU
    deterministic: bool = False  # a sequence's logits do not depend on what else is computed
    fused: bool = True  # layers of the Llama kind with fewer kernels
    graphs: bool = True  # replay decode steps from CUDA graphs


def parse_options(options: Mapping[str, str]) -> Options:
    """Raises OpenError for an option that is not known or has no such value."""
    known = [field.name for field in fields(Options)]
    if unknown := sorted(set(options) - set(known)):
        raise OpenError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
    return Options(
        device=_word(options, "device", DEVICES),
        dtype=_word(options, "dtype", DTYPES),
        weights=_word(options, "weights", WEIGHTS),
        slots=_number(options, "slots", 1, 65_536),
        step_tokens=_number(options, "step_tokens", 2, 1 << 20),
        depth=_number(options, "depth", 1, 2),
        deterministic=_word(options, "deterministic", ("false", "true")) == "true",
        fused=_word(options, "fused", ("true", "false")) == "true",
        graphs=_word(options, "graphs", ("true", "false")) == "true",
    )


def _word(options: Mapping[str, str], name: str, known: tuple[str, ...]) -> str:
    text = options.get(name, known[0])
    if text not in known:
        raise OpenError(f"{name} is {text!r}; known: {', '.join(known)}")
    return text


def _number(options: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    if (text := options.get(name)) is None:
        return None
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise OpenError(f"{name} is {text!r}; it is a number from {least} to {most}")
    return int(text)
