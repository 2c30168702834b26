"""Texts that no context can hold are told by their length: tokenizing megabytes takes seconds and memory."""

from server.errors import ContextTooLong
from server.pool.pool import Lease

SHORT = 1 << 16  # characters that are tokenized without asking
SHRINKING = 3  # bytes of a text that a normalizer makes one of, at most


def require_room(text: str, lease: Lease, param: str) -> None:
    """Raises ContextTooLong for a text that would have too many tokens if each were the longest there is."""
    if len(text) <= SHORT:
        return
    context = lease.engine.ready.limits.context
    longest = max(map(len, lease.text.pieces), default=1)
    fewest = len(text.encode("utf-8", "replace")) // (SHRINKING * max(longest, 1))
    if fewest > context:
        raise ContextTooLong(
            f"{param}: the context is {context} tokens, prompt and answer together; "
            f"the prompt has more than {fewest}",
            param=param,
        )
