"""The part of config.json that bitsandbytes' two formats share."""

from collections.abc import Mapping
from typing import Any

from quant.formats import fields
from quant.scheme import Scheme

_HEAD = "lm_head"  # what transformers keeps where nothing is named


def write_config(kept: tuple[str, ...], **options: object) -> dict[str, Any]:
    skipped = [*kept, *(() if _HEAD in kept else (_HEAD,))]
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped, **options}


def quantized(config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]) -> dict[str, Scheme | None]:
    skipped = fields.texts(config, "llm_int8_skip_modules") or (_HEAD,)
    return {name: None for name in modules if not any(_is_skipped(name, entry) for entry in skipped)}


def _is_skipped(module: str, entry: str) -> bool:
    """By transformers' rule: the end of the name, or its beginning up to a dot, as a regular expression."""
    if module.endswith(entry):
        return True
    return fields.starts(rf"({entry})(\.|$)", module)
