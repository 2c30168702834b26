"""Who asks a model knows its id; where its source lies is for those who have models.yaml."""

import os
import re
from pathlib import Path

SOURCE = "<source>"


def without_source(text: str, source: str, revision: str | None = None) -> str:
    """`text` with every name of a model's source, an absolute path or hub id, replaced.

    Of a folder whole paths are names, its last part alone is not: it may be any word.
    """
    for name in _names(source, revision):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", SOURCE, text)
    return text


def _names(source: str, revision: str | None) -> list[str]:
    """The longest first."""
    names = {source}
    if source.startswith("/"):
        names.add(os.path.realpath(source))
        if source.endswith(".gguf"):
            names.add(Path(source).name)
    else:
        repo = source.partition(":")[0]
        names |= {
            repo,
            f"models--{repo.replace('/', '--')}",
            *(f"{name}@{revision}" for name in (source, repo) if revision),
        }
    return sorted(names, key=len, reverse=True)
