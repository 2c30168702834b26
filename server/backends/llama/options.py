"""What `Open.options` may say to this backend."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from server.errors import OpenError

PAGE = 16  # tokens; reproducible prompts are computed in pieces of a page, so that a cached prefix cuts none
CELLS = 256  # llama.cpp gives out KV memory in such units
KV_TYPES = ("f16", "f32", "q8_0")


@dataclass(frozen=True)
class Options:
    kv_type: str | None = None  # None: f32 for F32 weights, which are served to be exact, else f16
    slots: int | None = None  # sequences held, running and cached; None: chosen from `parallel`
    step_tokens: int = 256  # in one forward pass: on a CPU twice as many gain nothing and stall the others
    deterministic: bool = False  # a sequence's logits do not depend on what else is computed
    gpu_layers: int = -1  # layers on the GPU, where llama.cpp was built for one; -1: all


def parse_options(options: Mapping[str, str]) -> Options:
    """Raises OpenError for an option that is not known or has no such value."""
    known = [field.name for field in fields(Options)]
    if unknown := sorted(set(options) - set(known)):
        raise OpenError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
    kv_type = options.get("kv_type", Options.kv_type)
    if kv_type is not None and kv_type not in KV_TYPES:
        raise OpenError(f"kv_type is {kv_type!r}; known: {', '.join(KV_TYPES)}")
    return Options(
        kv_type=kv_type,
        slots=_number(options, "slots", least=1) if "slots" in options else None,
        step_tokens=_number(options, "step_tokens", least=2, default=Options.step_tokens),
        deterministic=_flag(options, "deterministic"),
        gpu_layers=_number(options, "gpu_layers", least=-1, default=Options.gpu_layers),
    )


def _flag(options: Mapping[str, str], name: str) -> bool:
    text = options.get(name, "false")
    if text not in ("true", "false"):
        raise OpenError(f"{name} is {text!r}; known: true, false")
    return text == "true"


def _number(options: Mapping[str, str], name: str, *, least: int, default: int = 0) -> int:
    text = options.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        raise OpenError(f"{name} is {text!r}, not a number") from None
    if value < least:
        raise OpenError(f"{name} is {value}; it is at least {least}")
    return value


def cells(kv_tokens: int) -> int:
    """The size of KV memory that holds so many tokens."""
    return -(-kv_tokens // CELLS) * CELLS
