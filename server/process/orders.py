"""What a measuring process is told. Light: the web process uses it, too."""

from typing import Literal

from msgspec import Struct


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
