"""Regular expressions that users write on the names of tensors and modules."""

import re

# A small part of regular expressions: the native reader backtracks, so few repeats and none of a group.
_PATTERN = re.compile(r"[A-Za-z0-9_.^$|()\[\]\\*+?-]{1,200}")
_REPEAT = re.compile(r"[*+?]")
_REPEATED_GROUP = re.compile(r"\)[*+?]")
_MOST_REPEATS = 4


def is_plain(pattern: str) -> bool:
    """Whether the pattern is short, valid and cheap to match, for llama.cpp's matcher too."""
    if not _PATTERN.fullmatch(pattern) or _REPEATED_GROUP.search(pattern):
        return False
    if len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
