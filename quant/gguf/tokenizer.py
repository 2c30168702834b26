"""From tokenizer.json to GGUF's tokenizer metadata.

Two kinds are known: byte-level BPE (llama.cpp's "gpt2": the merges themselves) and SentencePiece-style BPE
with byte fallback (llama.cpp's "llama": one score a token). What llama.cpp would read differently is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from quant.errors import BadSource
from quant.files import read_json, shown
from quant.gguf.pretokenizers import BYTES, GPT2_BYTES, name_of, steps_of
from quant.gguf.specials import Specials, read_specials

TOKENIZER_LIMIT = 512 * 2**20  # bytes
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # SentencePiece's sign for a space
NEVER_MERGED = -1e9
KEPT = frozenset({"<unk>", "<s>", "<|endoftext|>"})
Kind = gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """What SentencePiece-style tokenizers do before merging; see `spaces_of`."""

    prefix: (
        str  # where a space is put: "sections" (between special tokens), "words", "text" (its start), "never"
    )
    cuts: bool = False  # merges never cross a space


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    model: str  # tokenizer.ggml.model
    pre: str  # tokenizer.ggml.pre
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    prefix_space: bool | None = None
    strips: bool = False  # special tokens take the spaces behind them; see `_strips`
    specials: Specials


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadSource("the checkpoint has no tokenizer.json")
    return read_json(path, TOKENIZER_LIMIT)


def read_vocabulary(folder: Path, config: Mapping[str, Any], rows: int) -> Vocabulary:
    """`rows`: of the embedding; tokens that the tokenizer lacks are filled up. Raises BadSource."""
    data = read_tokenizer_json(folder / "tokenizer.json")
    model = _model_of(data)
    tokens, kinds = _tokens(data, model, rows)
    ids = {text: number for number, text in enumerate(tokens) if kinds[number] != Kind.UNUSED}
    specials = read_specials(folder, config, data, ids)
    merges = _merges(model)
    if not is_byte_level(data):
        found = _sentencepiece(data, tokens, kinds, merges, specials)
        return replace(found, strips=_strips(data, ids))
    _refuse_normalizer(data)
    steps = steps_of(data.get("pre_tokenizer"))
    pre = name_of(
        steps,
        ignore_merges=bool(model.get("ignore_merges")),
        merges_complete=lambda: _complete(model, merges),
    )
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=tuple(" ".join(pair) for pair in merges),
        specials=specials,
    )


def _strips(data: Mapping[str, Any], ids: Mapping[str, int]) -> bool:
    """As Phi-3's do, by the one rule that llama.cpp has for it: not those of `KEPT`, but "</s>" too."""
    strip = {token["content"] for token in data.get("added_tokens") or () if token.get("rstrip")}
    return ids.keys() >= {*KEPT, "</s>"} and "</s>" in strip and not strip & KEPT


def write_vocabulary(vocabulary: Vocabulary, writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.prefix_space is not None:
        writer.add_add_space_prefix(vocabulary.prefix_space)
    _write_specials(vocabulary.specials, writer)


def _write_specials(specials: Specials, writer: gguf.GGUFWriter) -> None:
    # without an id llama.cpp takes 11 (or 1 and 2) for the ends of a text, whatever token that is
    bos = specials.bos if specials.bos is not None else specials.eos
    eos = specials.eos if specials.eos is not None else specials.bos
    if bos is not None and eos is not None:
        writer.add_bos_token_id(bos)
        writer.add_eos_token_id(eos)
    if specials.unk is not None:
        writer.add_unk_token_id(specials.unk)
    if specials.pad is not None:
        writer.add_pad_token_id(specials.pad)
    writer.add_add_bos_token(specials.add_bos)
    writer.add_add_eos_token(specials.add_eos)
    if specials.template is not None:
        writer.add_chat_template(specials.template)


def is_byte_level(data: Mapping[str, Any]) -> bool:
    steps = steps_of(data.get("pre_tokenizer"))
    return any(step in {BYTES, GPT2_BYTES} or step.startswith("ByteLevel") for step in steps)


def _model_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    model = data.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise BadSource(f"tokenizer.json: only BPE is supported, not {shown(kind)}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BadSource(f"tokenizer.json: {key} is not supported")
    return model


def _merges(model: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Pairs in order of rank; written as "a b" or ["a", "b"]."""
    pairs = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise BadSource(f"tokenizer.json: {shown(merge)} is not a pair of tokens to merge")
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


def _tokens(
    data: Mapping[str, Any], model: Mapping[str, Any], rows: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and kinds by id. llama.cpp aborts on a text that two ids share, so that is refused here."""
    texts, kinds = _base_tokens(model)
    for token in data.get("added_tokens") or ():
        match token:
            case {"id": int(number), "content": str(text)} if number >= 0 and text:
                if texts.get(number, text) != text:
                    raise BadSource(
                        f"tokenizer.json: token {number} is both {shown(texts[number])} and {shown(text)}"
                    )
                texts[number] = text
                kinds[number] = _added_kind(token, model)
            case _:
                raise BadSource(f"tokenizer.json: {shown(token)} is not an added token")
    if texts and max(texts) >= rows:
        raise BadSource(f"tokenizer.json has token {max(texts)}, but the embedding has only {rows:,} rows")
    taken = set(texts.values())
    if len(taken) < len(texts):
        raise BadSource("tokenizer.json: two tokens have the same text")
    if any("\0" in text for text in taken):
        raise BadSource("tokenizer.json: a token holds the character NUL, at which llama.cpp would cut it")
    for number in range(rows):
        if number not in texts:
            texts[number] = _unused(number, taken)
            kinds[number] = Kind.UNUSED
    return tuple(texts[n] for n in range(rows)), tuple(kinds[n] for n in range(rows))


def _base_tokens(model: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping) or not vocabulary:
        raise BadSource("tokenizer.json: the model has no vocabulary")
    texts: dict[int, str] = {}
    for text, number in vocabulary.items():
        if type(number) is not int or number < 0 or number in texts:
            raise BadSource(f"tokenizer.json: token {shown(text)} has an unusable id {shown(number)}")
        texts[number] = text
    fallback = bool(model.get("byte_fallback"))
    kinds: dict[int, int] = {
        number: Kind.BYTE if fallback and BYTE.fullmatch(text) else Kind.NORMAL
        for number, text in texts.items()
    }
    return texts, kinds


def _added_kind(token: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    if token["content"] == model.get("unk_token"):
        return int(Kind.UNKNOWN)
    return int(Kind.CONTROL if token.get("special") else Kind.USER_DEFINED)


def _unused(number: int, taken: set[str]) -> str:
    text = f"[PAD{number}]"
    while text in taken:
        text = f"[{text}]"
    return text


def _refuse_normalizer(data: Mapping[str, Any]) -> None:
    """llama.cpp does not normalize. NFC is let pass: it changes nothing in text that is already composed."""
    for step in _normalizers(data.get("normalizer")):
        if step.get("type") != "NFC":
            raise BadSource(f"tokenizer.json: llama.cpp has no normalizer {shown(dict(step))}")


def _normalizers(node: Any) -> list[Mapping[str, Any]]:
    match node:
        case None:
            return []
        case {"type": "Sequence", "normalizers": [*nodes]}:
            return [step for inner in nodes for step in _normalizers(inner)]
        case {"type": str()}:
            return [node]
    raise BadSource(f"tokenizer.json: {shown(node)} is not a normalizer")


def _complete(model: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> bool:
    """Merging makes each token of the base vocabulary from its own characters."""
    from tokenizers.models import BPE

    vocabulary = dict(model["vocab"])
    try:
        merging = BPE(vocabulary, list(merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadSource(f"tokenizer.json: {shown(str(error))}") from error
    made = {f"{left}{right}" for left, right in merges}
    return all(
        [part.value for part in merging.tokenize(text)] == [text] for text in vocabulary if text in made
    )


def spaces_of(data: Mapping[str, Any]) -> Spaces:
    """Raises BadSource for a way of treating spaces that llama.cpp does not have."""
    steps = [*_normalizers(data.get("normalizer")), *_pre_steps(data.get("pre_tokenizer"))]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    after_space = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    match steps:
        case [{"type": "Prepend", "prepend": "\u2581"}, second] if second == replace:
            return Spaces(prefix="sections")
        case [first] if first == replace:
            return Spaces(prefix="never")
        case [first, second] if first == replace and second == after_space:  # finds no space to cut at
            return Spaces(prefix="never")
        case [{"type": "Metaspace", "replacement": "\u2581"} as step]:
            otherwise = "always" if step.get("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", otherwise)
            prefix = {"always": "words", "first": "text", "never": "never"}.get(scheme)
            if prefix is not None:
                return Spaces(prefix=prefix, cuts=step.get("split", True))
    raise BadSource(
        f"tokenizer.json: llama.cpp has no such treatment of spaces: {shown([dict(s) for s in steps])}"
    )


def _pre_steps(node: Any) -> list[Mapping[str, Any]]:
    match node:
        case None:
            return []
        case {"type": "Sequence", "pretokenizers": [*nodes]}:
            return [step for inner in nodes for step in _pre_steps(inner)]
        case {"type": str()}:
            return [node]
    raise BadSource(f"tokenizer.json: {shown(node)} is not a pre-tokenizer")


def _sentencepiece(
    data: Mapping[str, Any],
    tokens: tuple[str, ...],
    kinds: tuple[int, ...],
    merges: Sequence[tuple[str, str]],
    specials: Specials,
) -> Vocabulary:
    spaces = spaces_of(data)
    if not data["model"].get("byte_fallback"):
        raise BadSource(
            "tokenizer.json: BPE that is neither byte-level nor falls back to bytes is not supported"
        )
    if sum(kind == Kind.BYTE for kind in kinds) != 256:
        raise BadSource("tokenizer.json: byte fallback needs all 256 tokens <0x00> to <0xFF>")
    normal = {text for text, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL}
    if spaces.cuts and (
        crossing := next((text for text in tokens if text in normal and SPACE in text[1:]), None)
    ):
        raise BadSource(f"tokenizer.json: token {shown(crossing)} crosses a space at which the text is cut")
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        scores=_scores(tokens, merges),
        prefix_space=spaces.prefix != "never",
        specials=specials,
    )


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """llama.cpp joins the neighbours whose joined text scores highest: the rank of the merge, negated."""
    best: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        best.setdefault(left + right, -float(rank))
    return tuple(best.get(text, NEVER_MERGED if len(text) > 1 else 0.0) for text in tokens)
