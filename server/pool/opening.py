"""What a variant allows, read from its files before an engine opens it."""

from pathlib import Path

from quant.gguf.header import read_header
from server.text.model import read_facts


def own_context(folder: Path) -> int | None:
    """Of a checkpoint's variant from its text.json; of a requantized GGUF file from its header."""
    if (folder / "text.json").exists():
        return read_facts(folder / "text.json").context
    return gguf_context(folder / "model.gguf")


def gguf_context(path: Path) -> int | None:
    header = read_header(path)
    length = header.metadata.get(f"{header.architecture}.context_length")
    return length if isinstance(length, int) else None


def served_context(wanted: int | None, own: int | None, default: int) -> int:
    """Tokens of one request: what models.yaml says, else the settings, but no more than the model's own.

    Beyond its own context a model computes positions that it never saw, and no error would tell.
    """
    return min(wanted or default, own or wanted or default)
