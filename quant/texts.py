"""The small files beside the weights: what the server needs to know of a model's text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from quant.checkpoint import CONFIG_LIMIT, TOKENIZER
from quant.files import read_json
from quant.source import Source

if TYPE_CHECKING:
    from quant.gguf.convert import Conversion

CONTROL = 3  # GGUF's token type of control tokens
# Control tokens that end a turn in the chat formats in use, whatever the configs call the end of a text.
ENDS_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|end_of_turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
    }
)
_RANGES = {  # what is outside is no recommendation but a mistake
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
}


class TextFacts(Struct, frozen=True, kw_only=True):
    """text.json."""

    bos: int | None
    eos: int | None
    end_ids: tuple[int, ...]  # every token that ends an answer
    add_bos: bool
    context: int  # tokens
    sampling: dict[str, float | int]  # what the model's authors recommend


def text_files(source: Source, conversion: "Conversion") -> dict[str, bytes]:
    """Files of a variant by name. Equal sources give equal bytes."""
    files = {
        TOKENIZER: (source.path / TOKENIZER).read_bytes(),
        "text.json": msgspec.json.format(msgspec.json.encode(text_facts(source, conversion)), indent=1)
        + b"\n",
    }
    if (template := conversion.vocabulary.specials.template) is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def text_facts(source: Source, conversion: "Conversion") -> TextFacts:
    vocabulary, specials = conversion.vocabulary, conversion.vocabulary.specials
    path = source.path / "generation_config.json"
    generation = read_json(path, CONFIG_LIMIT) if path.exists() else {}
    ends = {
        *_token_ids(source.config.get("eos_token_id")),
        *_token_ids(generation.get("eos_token_id")),
        *_ends_of_turn(vocabulary.tokens, vocabulary.kinds),
        *_token_ids(specials.eos),
    }
    return TextFacts(
        bos=specials.bos,
        eos=specials.eos,
        end_ids=tuple(sorted(number for number in ends if number < len(vocabulary.tokens))),
        add_bos=specials.add_bos,
        context=conversion.shape.context,
        sampling=_sampling(generation),
    )


def write_texts(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _token_ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def _ends_of_turn(tokens: Sequence[str], kinds: Sequence[int]) -> Iterable[int]:
    return [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == CONTROL and token in ENDS_OF_TURN
    ]


def _sampling(generation: Mapping[str, Any]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, (low, high) in _RANGES.items():
        value = generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            found[name] = float(value)
    if type(top_k := generation.get("top_k")) is int and top_k >= 0:
        found["top_k"] = top_k
    return found
