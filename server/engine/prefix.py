"""What sequences leave behind in their slots, and how much of it a new prompt can start from."""

from collections.abc import Iterable
from dataclasses import dataclass

# Salt, adapter, reproducible: prefixes are shared only inside one. What was computed in company differs in
# its last bits from what is computed alone, so that a reproducible sequence must not start from it.
Family = tuple[str, str | None, bool]


@dataclass(slots=True)
class Resident:
    """A slot whose first `held` positions are the KV of `tokens[:held]`."""

    slot: int
    tokens: list[int]
    held: int
    family: Family


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix; slices compare at C speed, so halve instead of looping."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def best_match(
    prompt: list[int], family: Family, residents: Iterable[Resident]
) -> tuple[Resident | None, int]:
    """The resident that shares most with the prompt, and how many tokens.

    The prompt's last token never counts: it has to be computed to get logits.
    """
    best, length = None, 0
    most = len(prompt) - 1
    for resident in residents:
        if resident.family != family or resident.held <= length or length == most:
            continue
        if resident.tokens[length] != prompt[length]:
            continue  # it cannot beat the best so far
        shared = min(common_prefix(resident.tokens, prompt), resident.held, most)
        if shared > length:
            best, length = resident, shared
    return best, length
