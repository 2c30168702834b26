"""Text to tokens by the model's tokenizer.json, in the web process."""

import asyncio
import os
from typing import Protocol

from tokenizers import Tokenizer

from server.errors import OpenError, RequestError

INLINE_CHARS = 512  # shorter texts (less than a millisecond) are not worth the way to a thread and back

# Each call has one text: no thread pool of its own, and no warning from the library when we start a process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Encode(Protocol):
    async def __call__(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...


class LocalTokenizer:
    """An Encode. Raises OpenError for a tokenizer.json that `tokenizers` cannot use.

    `bos` is put in front where `add_special` asks for it (None: this model has none). The file's
    post-processor is not used: it could also add an end, which would end every prompt. Padding and truncation
    that the file asks for are switched off: nothing is cut in silence.
    """

    def __init__(self, json_text: str, bos: int | None) -> None:
        self._json = json_text
        self._bos = [] if bos is None else [bos]
        self._parsing = load(json_text)
        self._literal: Tokenizer | None = None  # reads "<|im_end|>" as text; made when first needed

    async def __call__(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special, parse_special)
        return await asyncio.to_thread(self.encode, text, add_special, parse_special)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        tokenizer = self._parsing if parse_special else self._without_special()
        try:
            # Of all ways to encode only those for batches let go of the interpreter while they work.
            [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids: list[int] = encoding.ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("The text holds a lone surrogate, which is no character.") from None
        except BaseException as error:
            if not native(error):
                raise
            raise RequestError("The model's tokenizer cannot read this text.") from None
        return self._bos + ids if add_special else ids

    def _without_special(self) -> Tokenizer:
        if self._literal is None:
            literal = load(self._json)
            literal.encode_special_tokens = True
            self._literal = literal
        return self._literal


def load(json_text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json_text)
    except BaseException as error:
        if not native(error):
            raise
        raise OpenError(f"tokenizer.json is not usable: {' '.join(str(error).split())[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def native(error: BaseException) -> bool:
    """Failures of the Rust code: plain Exceptions, and panics, which derive from BaseException alone."""
    return type(error) is Exception or type(error).__name__ == "PanicException"
