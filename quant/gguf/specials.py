"""Tokens with a job and the chat template: read from the files beside a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.files import read_json

CONFIG_LIMIT = 64 * 2**20  # bytes; added tokens are repeated in tokenizer_config.json
TEMPLATE_LIMIT = 2**20


@dataclass(frozen=True, kw_only=True)
class Specials:
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool  # the tokenizer puts BOS before a text
    add_eos: bool
    template: str | None


def read_specials(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any], ids: Mapping[str, int]
) -> Specials:
    """tokenizer_config.json first, then special_tokens_map.json and config.json; `ids`: tokens by text."""
    words = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    first, last = _template_ends(tokenizer, ids)
    bos = first if first is not None else _id(words, config, ids, "bos")
    eos = _id(words, config, ids, "eos")
    return Specials(
        bos=bos,
        eos=eos,
        unk=_id(words, config, ids, "unk"),
        pad=_id(words, config, ids, "pad"),
        add_bos=_flag(words, "add_bos_token", first is not None) and bos is not None,
        add_eos=_flag(words, "add_eos_token", last is not None and last == eos) and eos is not None,
        template=_template(folder, words),
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, CONFIG_LIMIT) if path.is_file() else {}


def _id(words: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int], role: str) -> int | None:
    token = words.get(f"{role}_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(text, str) and text in ids:
        return ids[text]
    number = config.get(f"{role}_token_id")
    first = number[0] if isinstance(number, list) and number else number
    return first if type(first) is int and first in set(ids.values()) else None


def _flag(words: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    value = words.get(key)
    return value if isinstance(value, bool) else otherwise


def _template_ends(tokenizer: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The special tokens that the post-processor puts before and after a text."""
    for processor in _processors(tokenizer.get("post_processor")):
        match processor:
            case {"type": "TemplateProcessing", "single": [*pieces]} if pieces:
                return _piece(pieces[0], ids), _piece(pieces[-1], ids)
    return None, None


def _processors(node: Any) -> Iterator[Mapping[str, Any]]:
    match node:
        case {"type": "Sequence", "processors": [*nodes]}:
            for inner in nodes:
                yield from _processors(inner)
        case {"type": str()}:
            yield node


def _piece(piece: Any, ids: Mapping[str, int]) -> int | None:
    match piece:
        case {"SpecialToken": {"id": str(text)}}:
            return ids.get(text)
    return None


def _template(folder: Path, words: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; of several, "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > TEMPLATE_LIMIT:
            raise BadSource(f"{path.name} is larger than {TEMPLATE_LIMIT:,} bytes")
        return path.read_text(encoding="utf-8")
    match words.get("chat_template"):
        case str(template):
            return template
        case [*named]:
            return next((entry["template"] for entry in named if _is_default(entry)), None)
    return None


def _is_default(entry: Any) -> bool:
    match entry:
        case {"name": "default", "template": str()}:
            return True
    return False
