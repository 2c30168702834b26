"""A GGUF file in memory: its weights, its vocabulary and its chat template."""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.gguf.probe import rebuilt
from server.backends.llama.native import NATIVE_LOG, load_library
from server.errors import OpenError
from server.types import ModelText

ATTENTION_BYTES = 800  # of weights take as long as one head's look at one position: some 50 ns
LONGEST_PIECE = 1024  # bytes; longer ones are asked for again


class LlamaModel:
    """Owns a `llama_model`. Raises OpenError where llama.cpp cannot read the file."""

    def __init__(self, path: Path, gpu_layers: int, progress: Callable[[float], None]) -> None:
        self._path = path
        self.library = load_library()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.progress_callback = self.library.llama_progress_callback(_reporter(progress))
        NATIVE_LOG.forget()
        self.handle: Any = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise OpenError(f"cannot load {path.name}: {NATIVE_LOG.reason('it is no usable GGUF file')}")
        self._bytes: int = self.library.llama_model_size(self.handle)  # of all weights
        self._heads: int = self.library.llama_model_n_layer(self.handle) * self.library.llama_model_n_head(
            self.handle
        )
        self._vocab = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(self._vocab)
        self.context: int = self.library.llama_model_n_ctx_train(self.handle)
        self._buffer = ctypes.create_string_buffer(LONGEST_PIECE)
        self.pooling = self._metadata(f"{self._metadata('general.architecture')}.pooling_type")

    @property
    def kv_type(self) -> str:
        """What its keys and values are kept in where nobody says: as exact as its weights."""
        buffer = ctypes.create_string_buffer(16)
        size = self.library.llama_model_meta_val_str(self.handle, b"general.file_type", buffer, len(buffer))
        return "f32" if size > 0 and buffer.value == b"0" else "f16"

    def read_by(self, tokens: int, attended: int) -> int:
        """Bytes that a pass would read if each token read for itself: how long it takes, whatever the model.

        `attended`: positions that its tokens look at, all together.
        """
        return self._bytes * tokens + ATTENTION_BYTES * self._heads * attended

    def close(self) -> None:
        if self.handle:
            self.library.llama_model_free(self.handle)
            self.handle = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 16
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self.library.llama_tokenize(
                self._vocab, data, len(data), tokens, room, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def text(self) -> ModelText:
        """Everything that the web process needs to turn messages into tokens and tokens into text."""
        lib, vocab, tokens = self.library, self._vocab, range(self.vocab_size)
        hidden = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        control = tuple(t for t in tokens if lib.llama_vocab_get_attr(vocab, t) & hidden)
        template = lib.llama_model_chat_template(self.handle, None)
        pieces = [self._piece(t) for t in tokens]
        for token in control:
            pieces[token] = lib.llama_vocab_get_text(vocab, token)
        letter = self.tokenize("x", add_special=False, parse_special=False)
        return ModelText(
            pieces=tuple(pieces),
            control=control,
            chat_template=None if template is None else template.decode("utf-8", "replace"),
            bos=_token_or_none(lib.llama_vocab_bos(vocab)),
            eos=_token_or_none(lib.llama_vocab_eos(vocab)),
            end_ids=tuple(t for t in tokens if lib.llama_vocab_is_eog(vocab, t)),
            add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            space_first=bool(letter) and pieces[letter[0]].startswith(b" "),
            tokenizer=self._rebuilt(),
        )

    def _rebuilt(self) -> str | None:
        """The vocabulary as a tokenizer.json, where that gives the same tokens."""
        try:
            return rebuilt(self._path, partial(self.tokenize, add_special=False, parse_special=True))
        except BadSource:  # a file that llama.cpp reads and we do not
            return None

    def _metadata(self, key: str) -> str:
        """A value of the file's metadata as text; empty where there is none."""
        size = self.library.llama_model_meta_val_str(self.handle, key.encode(), self._buffer, LONGEST_PIECE)
        return self._buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    def _piece(self, token: int) -> bytes:
        """The token's bytes as llama.cpp writes them, with the space that starts a SentencePiece word."""
        size = self.library.llama_token_to_piece(self._vocab, token, self._buffer, LONGEST_PIECE, 0, False)
        if size >= 0:
            return self._buffer.raw[:size]
        buffer = ctypes.create_string_buffer(-size)
        self.library.llama_token_to_piece(self._vocab, token, buffer, -size, 0, False)
        return buffer.raw


def _reporter(progress: Callable[[float], None]) -> Callable[[float, object], bool]:
    def report(done: float, _user_data: object) -> bool:
        progress(done)
        return True  # go on loading

    return report


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else token
