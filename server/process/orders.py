"""What measuring and searching processes are told. Light: the web process uses it, too."""

from typing import Literal

from msgspec import Struct

from quant.measure.gate import Gate
from quant.search.target import Target


class MeasureOrder(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One variant of one source, opened as it will be served."""

    cache: str
    source: str  # folder, .gguf file or hub id
    revision: str | None = None
    key: str  # of the variant
    backend: str
    context: int  # tokens of one request, as it will be served
    parallel: int = 8
    threads: int | None = None
    corpus: str | None = None  # a text file instead of the source's own answers
    reference: Literal["auto", "plain", "gguf"] = "auto"  # plain: by torch; gguf: a float32 GGUF file
    texts: int | None = None  # exactly so many, whatever the error
    budget_s: float | None = None
    quick: bool = False  # distances only: no speeds, no perplexities, no blocks
    device: str = "auto"
    purpose: Literal["evaluation", "search"] = "evaluation"  # whose prompts start the source's own text


class SearchOrder(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The recipe that meets a target, to be found, built and measured."""

    cache: str
    source: str  # folder, .gguf file or hub id
    revision: str | None = None
    target: Target
    gate: Gate = Gate()  # what it rejects cannot win
    context: int | None = None  # tokens of one request, as models.yaml has it
    default_context: int  # where it says nothing
    parallel: int = 8
    threads: int | None = None
    texts: int = 24  # that mixtures are probed on
    measured_texts: int = 48  # that variants are measured on, before the winner's full measurement
    groups: int = 50  # sensitivities that are measured, at most about so many
    budget_s: float = 120.0  # for the winner's distances
    cache_max_bytes: int | None = None
