"""llama.cpp and `tokenizers` read the same text: are the tokens the same?

The variant is served with tokenizer.json; the comparison proves that the GGUF file's vocabulary, merges and
pre-tokenizer say the same to llama.cpp and to everybody else who opens the file.
"""

import ctypes
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quant.errors import BadSource, TokenizerMismatch
from quant.files import shown
from quant.gguf.native import captured, library
from quant.gguf.rebuild import CannotRebuild, read_stored, rebuild
from quant.gguf.tokenizer import is_byte_level, read_tokenizer_json, spaces_of

Tokenize = Callable[[str], list[int]]  # special tokens are read, none is added
PROBE: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say WE'VE 'seen' it; they're Peter's.",
    'def f(x: int) -> str:\n    """Doc."""\n\treturn f\'{x:>10}\' if x else None  # ok\n\n\nclass A(B):\n',
    "for (int i = 0; i < n; ++i) { a[i] += b->c * 0x1F & ~m; } // <html>&amp;</html>\r\n#include <x.h>\r\n",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 -42 1e-9 50% $9.99 v2.0 2024-01-31 x1y22z333",
    "Ça été très naïve: Übergröße, señor, smörgåsbord, Þórr, łódź, İstanbul, tiếng Việt.",
    "Ελληνικά: καλημέρα. Русский язык: съешь ещё. Українська: їжак. עברית: שלום. العربية: مرحبا بالعالم.",
    "中文\uff1a我想在苹果公司工作1314151天。日本語\uff1aひらがな、カタカナ。한국어: 안녕하세요!",
    "🚀 😀😃 👍🏽 👩‍👩‍👧 🇩🇪 ✅ ❤️ — “quotes” … ™ © € ½ ² №",
    "a  b   c    d     e\n\n\n  f\t\tg \n h\u00a0i\n",
    "trailing spaces   ",
    "!!! ??? ... --- *** ((())) [[]] {{}} == === != <= >= && || ++ -- :: -> => /* */ `` ```",
)
LEADING_SPACES = (" one space", "   three spaces", "\n\nlines first", "\ttab first")
MOST_SPECIALS = 64  # of the added tokens, spread evenly


def compare(gguf: Path, tokenizer_json: Path) -> None:
    """Raises TokenizerMismatch with both token lists, or BadSource when either side cannot be opened."""
    data = read_tokenizer_json(tokenizer_json)
    with open_vocabulary(gguf) as tokenize:
        _require_equal(data, tokenizer_json.read_text("utf-8"), tokenize)


def rebuilt(gguf: Path, tokenize: Tokenize) -> str | None:
    """A tokenizer.json of the file's vocabulary that gives the tokens of `tokenize`, which is llama.cpp's.

    None where there is none, or where the probe finds a difference. Raises BadSource (no GGUF).
    """
    try:
        text = rebuild(read_stored(gguf))
        _require_equal(json.loads(text), text, tokenize)
    except (CannotRebuild, TokenizerMismatch):
        return None
    return text


def _require_equal(data: Mapping[str, Any], text: str, tokenize: Tokenize) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise BadSource(f"tokenizer.json cannot be opened: {shown(str(error))}") from error
    for probe in _texts(data):
        theirs = tokenizer.encode(probe, add_special_tokens=False).ids
        ours = tokenize(probe)
        if ours != theirs:
            raise TokenizerMismatch(
                f"llama.cpp and tokenizers differ on {shown(probe)}: llama.cpp {ours}, tokenizers {theirs}"
            )


def _texts(data: Mapping[str, Any]) -> Iterator[str]:
    """What both can express. Left out is what llama.cpp has no setting for: it always puts its space before a
    text that begins with one, and after each special token, where Metaspace does not.
    """
    prefix = "never" if is_byte_level(data) else spaces_of(data).prefix
    specials = _some_specials(data)
    yield from PROBE
    yield from (f"before{token}" for token in specials)
    if prefix != "text":
        yield from (f"{token}after{token}{token}again" for token in specials)
    if prefix in {"sections", "never"}:
        yield from LEADING_SPACES
        yield from (f"{token} spaced {token}\n" for token in specials)


def _some_specials(data: Mapping[str, Any]) -> Sequence[str]:
    added = [token["content"] for token in data.get("added_tokens") or ()]
    return added[:: max(1, len(added) // MOST_SPECIALS)]


class Tokenizing:
    """llama.cpp's tokens of a text, while the vocabulary is open."""

    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary

    def __call__(self, text: str, *, special: bool = True) -> list[int]:
        """`special`: control tokens are read where they are spelled."""
        native = library()
        raw = text.encode()
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = native.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, False, special)
        return list(tokens[: max(count, 0)])


@contextmanager
def open_vocabulary(gguf: Path) -> Iterator[Tokenizing]:
    """llama.cpp's vocabulary of a GGUF file, without its weights."""
    native = library()
    params = native.llama_model_default_params()
    params.vocab_only = True
    with captured() as log:
        model = native.llama_model_load_from_file(os.fsencode(gguf), params)
        if not model:
            reason = log.errors[-1] if log.errors else "no reason given"
            raise BadSource(f"llama.cpp cannot read the vocabulary: {reason.replace(str(gguf), gguf.name)}")
        try:
            yield Tokenizing(native.llama_model_get_vocab(model))
        finally:
            native.llama_model_free(model)
