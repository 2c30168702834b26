"""The bytes that each token stands for, read from a tokenizer.json.

What `tokenizers` does with a list of tokens is written in the file's `decoder`. The decoders of language
models work token by token and then join bytes, so that a table of bytes says all of it but one thing: some
of them drop a space at the start of a text (`drops_space`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from server.errors import OpenError

MAX_FILE_BYTES = 256 << 20
MAX_TOKENS = 1 << 22  # a hostile id must not size our table

Start = Literal["keep", "one", "token"]  # spaces dropped at the start: none, one, those of the first token


@dataclass(frozen=True)
class Vocabulary:
    """`pieces[i]` are the bytes of token i (of control tokens their text), empty for ids of no token."""

    pieces: tuple[bytes, ...]
    control: frozenset[int]  # tokens that are not part of a text
    start: Start = "keep"
    unk: str | None = None

    def bytes_of(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def text_of(self, token: int) -> str:
        """A single token for people: bytes that are no whole character become U+FFFD."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def find(self, text: str) -> int | None:
        """The first token that is exactly this text."""
        wanted = text.encode()
        return self.pieces.index(wanted) if wanted in self.pieces else None


class ByteLevel(Struct, tag=True):
    pass


class ByteFallback(Struct, tag=True):
    pass


class Fuse(Struct, tag=True):
    pass


class Literally(Struct):
    String: str  # the other kind, Regex, is not supported


class Replace(Struct, tag=True):
    pattern: Literally
    content: str


class Strip(Struct, tag=True):
    content: str
    start: int
    stop: Literal[0] = 0


class Metaspace(Struct, tag=True):
    replacement: str = "▁"
    prepend_scheme: Literal["always", "first", "never"] = "always"


Step = ByteLevel | ByteFallback | Fuse | Replace | Strip | Metaspace


class Sequence(Struct, tag=True):
    decoders: list[Step]


class Added(Struct):
    id: int
    content: str
    special: bool = False


class Model(Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    unk_token: str | None = None

    def tokens(self) -> dict[str, int]:
        if isinstance(self.vocab, dict):
            return self.vocab
        return {text: i for i, (text, _) in enumerate(self.vocab)}


class TokenizerFile(Struct):
    model: Model
    decoder: Step | Sequence
    added_tokens: list[Added] = []


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises OpenError for a file that is missing, malformed or of a kind that we cannot show faithfully."""
    return parse_vocabulary(read_capped(path, MAX_FILE_BYTES))


def read_capped(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise OpenError(f"{path.name} is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise OpenError(f"{path.name} cannot be read: {error.strerror}") from None


def parse_vocabulary(data: bytes) -> Vocabulary:
    try:
        file = msgspec.json.decode(data, type=TokenizerFile)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise OpenError(f"tokenizer.json is not usable: {str(error)[:200]}") from None
    steps = file.decoder.decoders if isinstance(file.decoder, Sequence) else [file.decoder]
    table = {i: token for token, i in file.model.tokens().items()}
    table |= {added.id: added.content for added in file.added_tokens}
    if not table or min(table) < 0 or max(table) >= MAX_TOKENS:
        raise OpenError(f"tokenizer.json: token ids must lie between 0 and {MAX_TOKENS - 1}")
    body, start = split_steps(steps)
    pieces = tuple(token_bytes(table[i], body) if i in table else b"" for i in range(max(table) + 1))
    control = frozenset(added.id for added in file.added_tokens if added.special)
    return Vocabulary(pieces, control, start, file.model.unk_token)


def split_steps(steps: list[Step]) -> tuple[list[Step], Start]:
    """The steps that see single tokens, and what is done to the joined text: only dropping a first space."""
    cut = next((i for i, step in enumerate(steps) if isinstance(step, Fuse | ByteLevel)), len(steps))
    body, rest = steps[:cut], [step for step in steps[cut:] if not isinstance(step, Fuse)]
    match rest:
        case []:
            first = any(isinstance(s, Metaspace) and s.prepend_scheme != "never" for s in body)
            return body, "token" if first else "keep"
        case [ByteLevel() as step]:
            return [*body, step], "keep"
        case [Strip(content=" ", start=1)]:
            return body, "one"
    raise OpenError("tokenizer.json: this order of decoders is not supported")


def token_bytes(token: str, steps: list[Step]) -> bytes:
    text = token
    for step in steps:
        match step:
            case Replace():
                text = text.replace(step.pattern.String, step.content)
            case Metaspace():
                text = text.replace(step.replacement, " ")
            case Strip():
                text = strip_start(text, step)
            case ByteFallback():
                if (byte := fallback_byte(text)) is not None:
                    return bytes([byte])
            case ByteLevel():
                return byte_level(text)
            case Fuse():
                pass
    return text.encode()


def strip_start(text: str, step: Strip) -> str:
    for _ in range(min(step.start, len(text))):
        if not step.content or not text.startswith(step.content):
            break
        text = text[len(step.content) :]
    return text


def fallback_byte(token: str) -> int | None:
    """SentencePiece spells bytes that no token covers as `<0x0A>`."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def byte_level(token: str) -> bytes:
    """A token with any character outside the byte alphabet (some added tokens) stands for its own text."""
    try:
        return bytes([BYTES[char] for char in token])
    except KeyError:
        return token.encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the rest follow in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


BYTES = byte_alphabet()
