"""The text that methods look at: written by the source itself, or taken from a file; as tokens, cached.

By default the source answers short prompts of ours, sampled at temperature 1: the text is what the model
says, and nothing has to be downloaded (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", Findings
of ACL 2024, section 3.1). A source too large to be run here lends its tokenizer only: then the prompts
themselves are the text.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quant.canonical import canonical_digest, content_digest
from quant.checkpoint import TOKENIZER
from quant.dialogue import Template, TemplateFailed
from quant.errors import BadRecipe, BadSource
from quant.files import open_regular, shown, sync_file
from quant.locks import lock_file
from quant.progress import Report
from quant.prompts import PromptSet, prompts
from quant.source import Source
from quant.text_choice import Text
from quant.texts import Words, read_words, text_facts

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from quant.sampling import Speech

TEXT_VERSION = 1  # raised when the same source and calibration give another text
CORPUS_LIMIT = 1 << 30  # bytes


def calibration_tokens(
    source: Source, text: Text, rows: int, *, cache: Path, device: "torch.device", report: Report
) -> "torch.Tensor":
    """int64 [samples, length]; `rows`: of the embedding. Raises BadRecipe (a short corpus), BadSource.

    Equal sources and texts give equal tokens on one kind of device and number of threads, and any that the
    cache has.
    """
    key = _key(source, text)
    file = cache / "calibration" / f"{key}.safetensors"
    with lock_file(cache / "locks" / f"calibration-{key}"):  # others wait for this text
        if (known := _kept(file)) is not None:
            return known
        tokens = _make(source, text, rows, device, report)
        _keep(file, tokens)
        return tokens


def _kept(file: Path) -> "torch.Tensor | None":
    """What a build before this one wrote; None for a file that is damaged, too: it is made anew."""
    from quant.tensors import read_file

    try:
        return read_file(file)["tokens"] if file.exists() else None
    except (BadSource, KeyError):
        return None


def _keep(file: Path, tokens: "torch.Tensor") -> None:
    from quant.tensors import write_file

    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    try:
        write_file(fresh, {"tokens": tokens})
        sync_file(fresh)
        fresh.rename(file)
    finally:
        fresh.unlink(missing_ok=True)


def _key(source: Source, text: Text) -> str:
    corpus = content_digest(Path(text.corpus)) if text.corpus else None
    what = [TEXT_VERSION, source.digest, text.kind, text.samples, text.length, text.seed, corpus]
    return canonical_digest(what)[:32]


def _make(source: Source, text: Text, rows: int, device: "torch.device", report: Report) -> "torch.Tensor":
    import torch

    from quant.sampling import write_text

    words = read_words(source, rows, text.length)
    tokenizer = open_tokenizer(source)
    rng = random.Random(text.seed)
    match text.kind:
        case "self":
            speech = speech_for(source, "calibration", rows)
            return write_text(source.path, speech, text, device=device, report=report)
        case "prompts":
            questions = asked(prompts("calibration"), tokenizer, words)
            return torch.tensor([_row(questions, text.length, rng) for _ in range(text.samples)])
        case "corpus":
            return torch.tensor(_windows(_corpus(Path(text.corpus or ""), tokenizer, words), text, rng))


def speech_for(source: Source, which: PromptSet, rows: int) -> "Speech":
    """What `quant.sampling` needs to let the source answer our prompts. Raises BadSource."""
    from quant.sampling import Speech

    words = read_words(source, rows, context=1)
    tokenizer = open_tokenizer(source)
    return Speech(
        questions=asked(prompts(which), tokenizer, words),
        ends=frozenset(text_facts(source, words).end_ids),
        start=words.specials.bos if words.specials.add_bos else None,
        known=1 + max(tokenizer.get_vocab().values()),
    )


def open_tokenizer(source: Source) -> "Tokenizer":
    """Raises BadSource."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(source.path / TOKENIZER))
    except Exception as error:  # tokenizers raises plain Exception
        raise BadSource(f"{TOKENIZER} cannot be opened: {shown(str(error))}") from error


def asked(questions: Sequence[str], tokenizer: "Tokenizer", words: Words) -> list[list[int]]:
    """Tokens of each question as the model is asked it; as they are where it has no template that works."""
    template = _template(words)
    texts = [_ask(template, question) for question in questions]
    return [found for text in texts if (found := tokenizer.encode(text, add_special_tokens=False).ids)]


def _template(words: Words) -> Template | None:
    if words.specials.template is None:
        return None
    texts = {number: token for token, number in words.control.items()}
    ids = {"bos_token": words.specials.bos, "eos_token": words.specials.eos}
    tokens = {name: texts.get(number, "") for name, number in ids.items() if number is not None}
    try:
        return Template(words.specials.template, tokens)
    except TemplateFailed:
        return None


def _ask(template: Template | None, question: str) -> str:
    if template is not None:
        try:
            return template.ask(question)
        except TemplateFailed:
            pass
    return f"{question}\n"


def _row(texts: Sequence[Sequence[int]], length: int, rng: random.Random) -> list[int]:
    """So many tokens of the texts, in an order of its own."""
    row: list[int] = []
    while len(row) < length:
        for text in rng.sample(texts, len(texts)):
            row += text
    return row[:length]


def _windows(tokens: Sequence[int], text: Text, rng: random.Random) -> list[Sequence[int]]:
    """Pieces that do not overlap, drawn at random."""
    have = len(tokens) // text.length
    if have < text.samples:
        raise BadRecipe(
            f"the calibration corpus has {len(tokens):,} tokens; {text.samples} x {text.length} need "
            f"{text.samples * text.length:,}"
        )
    starts = sorted(rng.sample(range(have), text.samples))
    return [tokens[start * text.length : (start + 1) * text.length] for start in starts]


def _corpus(path: Path, tokenizer: "Tokenizer", words: Words) -> list[int]:
    """The whole text; documents of a .jsonl file end with the end-of-text token."""
    end = [] if words.specials.eos is None else [words.specials.eos]
    tokens: list[int] = []
    for document in _documents(path):
        tokens += tokenizer.encode(document, add_special_tokens=False).ids + end
    return tokens


def _documents(path: Path) -> Iterator[str]:
    """Raises BadRecipe naming the line that is none."""
    with open_regular(path) as stream:
        raw = stream.read(CORPUS_LIMIT + 1)
    if len(raw) > CORPUS_LIMIT:
        raise BadRecipe(f"the calibration corpus is larger than {CORPUS_LIMIT:,} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadRecipe(f"the calibration corpus is no UTF-8 text at byte {error.start:,}") from error
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _text_of(line, number)


def _text_of(line: str, number: int) -> str:
    try:
        match json.loads(line):
            case {"text": str(text)}:
                return text
    except (ValueError, RecursionError):
        pass
    raise BadRecipe(f'the calibration corpus has no object with a "text" in line {number}')
