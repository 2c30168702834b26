"""What a model is scored on: runs of tokens, and which of them count. One function per way of cutting."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import BadSource
from quant.files import open_regular

LARGEST_CORPUS = 256 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that are read from an empty context. Those from `first` on are scored; 0 cannot be."""

    tokens: tuple[int, ...]
    first: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.first < len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens of which those from {self.first} on are scored")

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Chunks, and what is to be said whenever a figure of them is shown."""

    chunks: tuple[Chunk, ...]
    corpus: str  # sha256 of what was cut, 64 hexadecimal digits
    tokenizer: str  # the same of tokenizer.json
    cut: str  # "512 tokens, second halves"

    @property
    def scored(self) -> int:
        return sum(chunk.scored for chunk in self.chunks)

    @property
    def longest(self) -> int:
        return max(len(chunk.tokens) for chunk in self.chunks)

    @property
    def digest(self) -> str:
        """Of the tokens that are read and scored, whatever they were cut from."""
        body = json.dumps([[chunk.first, *chunk.tokens] for chunk in self.chunks], separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()

    def first_chunks(self, count: int) -> "Text":
        return Text(chunks=self.chunks[:count], corpus=self.corpus, tokenizer=self.tokenizer, cut=self.cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A text as one run of tokens, without any that a model puts around a text."""

    tokens: tuple[int, ...]
    digest: str
    tokenizer: str
    begins_with: int | None = None  # the token that the model's texts begin with, if it wants one

    def text(self, chunks: Iterator[Chunk], cut: str) -> Text:
        """Raises BadSource where the corpus is too short for one chunk."""
        found = tuple(chunks)
        if not found:
            raise BadSource(f"the text has {len(self.tokens):,} tokens, too few for one chunk ({cut})")
        return Text(chunks=found, corpus=self.digest, tokenizer=self.tokenizer, cut=cut)


def read_corpus(path: Path, tokenizer_json: Path, *, begins_with: int | None = None) -> Corpus:
    """A UTF-8 file through a tokenizer.json. Raises BadSource."""
    from tokenizers import Tokenizer

    try:
        with open_regular(path) as stream:
            raw = stream.read(LARGEST_CORPUS + 1)
        words, data = raw.decode("utf-8"), tokenizer_json.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSource(f"{path.name} cannot be read as UTF-8 text") from error
    if len(raw) > LARGEST_CORPUS:
        raise BadSource(f"{path.name} is larger than {LARGEST_CORPUS:,} bytes")
    tokens = Tokenizer.from_buffer(data).encode(words, add_special_tokens=False).ids
    return Corpus(
        tokens=tuple(tokens),
        digest=hashlib.sha256(raw).hexdigest(),
        tokenizer=hashlib.sha256(data).hexdigest(),
        begins_with=begins_with,
    )


def chunked(corpus: Corpus, size: int) -> Text:
    """Chunks that do not overlap, all tokens but each first one scored, tail dropped.

    With 2048 tokens this is what the GPTQ and AWQ papers compute perplexity on.
    """
    chunks = (Chunk(run) for run in _runs(corpus.tokens, size))
    return corpus.text(chunks, f"{size} tokens, all but the first")


def halves(corpus: Corpus, size: int = 512) -> Text:
    """llama.cpp's way (tools/perplexity): chunks that do not overlap, the model's first token put over each
    chunk's first one, only the second half scored, and its own first token not."""
    begin = corpus.begins_with
    runs = _runs(corpus.tokens, size)
    chunks = (Chunk(run if begin is None else (begin, *run[1:]), size // 2 + 1) for run in runs)
    return corpus.text(chunks, f"{size} tokens, second halves")


def windows(corpus: Corpus, size: int, stride: int) -> Text:
    """Windows of `size` tokens, `stride` apart, each token scored in the first that has it."""
    if not 0 < stride < size:
        raise ValueError(f"a stride of {stride} with windows of {size}")
    return corpus.text(_windows(corpus.tokens, size, stride), f"windows of {size} tokens, stride {stride}")


def _runs(tokens: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(tokens) - size + 1, size):
        yield tuple(tokens[start : start + size])


def _windows(tokens: Sequence[int], size: int, stride: int) -> Iterator[Chunk]:
    done = 1  # nothing comes before the first token
    for start in range(0, len(tokens), stride):
        end = min(start + size, len(tokens))
        if end > done:
            yield Chunk(tuple(tokens[start:end]), done - start)
        done = max(done, end)
        if end == len(tokens):
            return
