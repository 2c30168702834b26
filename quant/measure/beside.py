"""What lies beside the weights and decides what a variant computes and says: the source's own, exactly.

A divergence does not show it: the source's tokens are asked for by number, and a hyperparameter that is
slightly off harms less than four bits do.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant.checkpoint import CONFIG_LIMIT
from quant.files import read_json
from quant.gguf.header import read_header
from quant.source import Source
from quant.texts import folder_texts

OF_THE_FORMAT = frozenset(
    {"quantization_config", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
)


def strange(source: Source, reference: Path, variant: Path) -> tuple[str, ...]:
    """What is not the source's: "tokenizer.json", "llama.rope.freq_base".

    `reference`: a GGUF file, or a folder with one, that the variant's GGUF is held beside. Raises BadSource
    for files that cannot be read, OSError.
    """
    found = [*_texts(source, variant)] if source.kind == "hf" else []
    model = variant / "model.gguf"
    if model.is_file():
        base = reference / "model.gguf" if reference.is_dir() else reference
        if base.is_file():
            found += _differing(_metadata(base), _metadata(model))
    elif source.kind == "hf":
        config = read_json(variant / "config.json", CONFIG_LIMIT)
        found += (f"config.json's {key}" for key in _differing(_own(source.config), _own(config)))
    return tuple(found)


def _texts(source: Source, variant: Path) -> Iterator[str]:
    for name, expected in folder_texts(source.path).items():
        path = variant / name
        if not path.is_file() or path.read_bytes() != expected:
            yield name


def _metadata(file: Path) -> Mapping[str, Any]:
    """The model's own numbers and its tokenizer; not what says how the file was made."""
    header = read_header(file, keep=lambda key: key.startswith("tokenizer."))
    prefixes = (f"{header.architecture}.", "tokenizer.")
    return {key: value for key, value in header.metadata.items() if key.startswith(prefixes)}


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: a tuple is a list."""
    kept = {key: value for key, value in config.items() if key not in OF_THE_FORMAT}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    missing = object()
    return sorted(
        key for key in ours.keys() | theirs.keys() if ours.get(key, missing) != theirs.get(key, missing)
    )
