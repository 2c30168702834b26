"""Checkpoints that somebody quantized already: served as they are, like GGUF files. Reads config.json."""

from collections.abc import Mapping
from typing import Any

from quant.errors import BadSource
from quant.files import shown

# quant_method -> what further field tells formats apart, and the formats by its value.
FORMATS: dict[str, tuple[str | None, dict[object, str]]] = {
    "awq": (None, {None: "awq"}),
    "gptq": (None, {None: "gptq"}),
    "bitsandbytes": ("load_in_8bit", {True: "bnb8", False: "bnb4", None: "bnb4"}),
    "compressed-tensors": (
        "format",
        {"pack-quantized": "compressed-tensors", "int-quantized": "compressed-tensors-int8"},
    ),
}


def own_format(config: Mapping[str, Any]) -> str | None:
    """The format of a quantized checkpoint; None for one in full precision. Raises BadSource for others."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    field, formats = FORMATS.get(method, (None, {})) if isinstance(method, str) else (None, {})
    value = quantization.get(field) if field else None
    found = formats.get(value) if isinstance(value, str | bool | None) else None
    if found is None:
        said = f" with {field} {shown(value)}" if formats else ""
        raise BadSource(f"quantization_config: quant_method {shown(method)}{said} is not supported")
    return found
