"""What some requests make an engine hold beyond its weights and its KV memory, from the first of them on.

Measured with the llama backend on models of 16 and 34 million weights: structured output took 47 MB (the
grammar library and its tables of the vocabulary, in the engine and in the process that tries grammars),
scored prompts up to 30 MB and embeddings up to 8 MB.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

Use = Literal["grammar", "scores", "vectors"]
NONE: frozenset[Use] = frozenset()
ALL: frozenset[Use] = frozenset(("grammar", "scores", "vectors"))

MIB = 1 << 20
GRAMMARS = 50 * MIB
GRAMMAR_TOKEN = 320  # bytes for each token of the vocabulary
VECTORS = 12 * MIB
LOGITS = 64 * MIB  # most of one pass's
STEP_TOKENS = 256


def extras(backend: str, vocabulary: int) -> dict[Use, int]:
    """Bytes of RAM by use."""
    if backend.startswith("toy"):
        return {}
    found: dict[Use, int] = {"grammar": GRAMMARS + GRAMMAR_TOKEN * vocabulary}
    if backend == "llama":
        found["scores"] = 2 * min(LOGITS, 4 * STEP_TOKENS * vocabulary)
        found["vectors"] = VECTORS
    return found


def extra(uses: Iterable[Use], sizes: Mapping[Use, int]) -> int:
    """Bytes of RAM of some uses together."""
    return sum(sizes.get(use, 0) for use in uses)
