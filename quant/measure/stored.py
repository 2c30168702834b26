"""A reference on disk: one safetensors file, arrays of all chunks one after the other."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import BadSource
from quant.measure.score import Expected, Reference
from quant.measure.text import Text

ARRAYS = ("tokens", "logs", "rest", "target", "best")


def save_reference(reference: Reference, path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {name: np.concatenate([getattr(chunk, name) for chunk in reference.chunks]) for name in ARRAYS}
    save_file(arrays, path, metadata={"text": reference.text.digest})


def load_reference(path: Path, text: Text) -> Reference:
    """Raises BadSource where the file is damaged or of another text."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in ARRAYS}
    except (OSError, SafetensorError) as error:
        raise BadSource(f"{path.name} is no stored reference: {json.dumps(str(error))}") from error
    if about.get("text") != text.digest or len(arrays["rest"]) != text.scored:
        raise BadSource(f"{path.name} is the reference of another text")
    cuts = np.cumsum([chunk.scored for chunk in text.chunks])[:-1]
    parts = [np.split(arrays[name], cuts) for name in ARRAYS]
    return Reference(text, tuple(Expected(*chunk) for chunk in zip(*parts, strict=True)))
