"""The small files beside the weights: what the server needs to know of a model's text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from quant.checkpoint import CONFIG_LIMIT, TEXT_FILES, TOKENIZER, read_config
from quant.errors import BadSource
from quant.files import read_json, shown
from quant.gguf.specials import Specials, read_specials
from quant.source import Source

CONTROL = 3  # GGUF's token type of control tokens
TOKENIZER_LIMIT = 512 << 20  # bytes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is known of a checkpoint's tokens."""

    specials: Specials
    control: Mapping[str, int]  # tokens with a job, by text
    rows: int  # of the embedding; ids are below
    context: int  # tokens


def words_of(conversion: Any) -> Words:
    """Of a checkpoint that the converter to GGUF has read: its Conversion, too heavy to be named here."""
    vocabulary = conversion.vocabulary
    pairs = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    return Words(
        specials=vocabulary.specials,
        control={token: number for number, (token, kind) in enumerate(pairs) if kind == CONTROL},
        rows=len(vocabulary.tokens),
        context=conversion.shape.context,
    )


def read_words(source: Source, rows: int, context: int) -> Words:
    """Of any checkpoint with a tokenizer.json. Raises BadSource for ids that the embedding lacks."""
    data = read_json(source.path / TOKENIZER, TOKENIZER_LIMIT)
    model = data.get("model")
    ids, control = _base_ids(model), {}
    for token in data.get("added_tokens") or ():
        match token:
            case {"id": int(number), "content": str(text)}:
                ids[text] = number
                if token.get("special") and text != (model or {}).get("unk_token"):
                    control[text] = number
            case _:
                raise BadSource(f"{TOKENIZER}: {shown(token)} is not an added token")
    if ids and not 0 <= max(ids.values()) < rows:
        raise BadSource(
            f"{TOKENIZER} has token {max(ids.values())}, but the embedding has only {rows:,} rows"
        )
    specials = read_specials(source.path, source.config, data, ids)
    return Words(specials=specials, control=control, rows=rows, context=context)


def _base_ids(model: object) -> dict[str, int]:
    """Ids by text; unigram models list their tokens with scores, the others number them."""
    match model:
        case {"vocab": Mapping() as vocabulary}:
            return {text: number for text, number in vocabulary.items() if type(number) is int}
        case {"vocab": [*pairs]}:
            return {pair[0]: number for number, pair in enumerate(pairs) if isinstance(pair, list) and pair}
    raise BadSource(f"{TOKENIZER}: the model has no vocabulary")


def folder_texts(folder: Path) -> dict[str, bytes]:
    """`text_files` of a checkpoint that is served as it is. Raises BadSource."""
    config, architecture = read_config(folder)
    rows, context = (config.get(name) for name in ("vocab_size", "max_position_embeddings"))
    if type(rows) is not int or type(context) is not int:
        raise BadSource("config.json has no vocab_size or max_position_embeddings")
    unnamed = Source(  # of a source only its folder and its config are read here
        kind="hf",
        id="",
        path=folder,
        revision=None,
        digest="",
        architecture=architecture,
        config=config,
        bytes=0,
    )
    return text_files(unnamed, read_words(unnamed, rows, context))


def text_files(source: Source, words: Words) -> dict[str, bytes]:
    """Files of a variant by name. Equal sources give equal bytes."""
    facts = msgspec.json.format(msgspec.json.encode(text_facts(source, words)), indent=1)
    files = {TOKENIZER: (source.path / TOKENIZER).read_bytes(), "text.json": facts + b"\n"}
    if (template := words.specials.template) is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def companion_files(source: Source) -> dict[str, bytes]:
    """Further small files that other readers of a checkpoint's folder look for, as they are."""
    return {
        name: (source.path / name).read_bytes()
        for name in TEXT_FILES
        if name not in {"config.json", TOKENIZER, "chat_template.jinja"} and (source.path / name).exists()
    }


def text_facts(source: Source, words: Words) -> TextFacts:
    specials = words.specials
    path = source.path / "generation_config.json"
    generation = read_json(path, CONFIG_LIMIT) if path.exists() else {}
    ends = {
        *_token_ids(source.config.get("eos_token_id")),
        *_token_ids(generation.get("eos_token_id")),
        *(number for token, number in words.control.items() if token in ENDS_OF_TURN),
        *_token_ids(specials.eos),
    }
    return TextFacts(
        bos=specials.bos,
        eos=specials.eos,
        end_ids=tuple(sorted(number for number in ends if number < words.rows)),
        add_bos=specials.add_bos,
        context=words.context,
        sampling=_sampling(generation),
    )


def write_texts(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _token_ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def _sampling(generation: Mapping[str, Any]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, (low, high) in _RANGES.items():
        value = generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            found[name] = float(value)
    if type(top_k := generation.get("top_k")) is int and top_k >= 0:
        found["top_k"] = top_k
    return found
