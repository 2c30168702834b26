"""llama.cpp's C interface, imported late, and what it says while it works.

llama.cpp logs through one callback of the process. Here it is caught instead of printed, because the
reason of a failure is only in them.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from quant.gguf.library import load_backends

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@cache
def library() -> ModuleType:
    """llama_cpp's low-level module, ready for use. Raises ImportError where it is not installed."""
    import llama_cpp.llama_cpp as native

    module: ModuleType = native
    load_backends(module)
    module.llama_backend_init()
    return module


class Log:
    """What llama.cpp says, in the pieces that its callback gets: lines, parts of lines or several lines."""

    def __init__(self, on_piece: Callable[[str], None] | None = None) -> None:
        self.errors: list[str] = []  # without line ends and rulers
        self._on_piece = on_piece or (lambda _: None)

    def add(self, level: int, text: str) -> None:
        self._on_piece(text)
        if level == ERROR and (words := " ".join(text.replace("==", "").split())):
            self.errors.append(words)


@contextmanager
def captured(on_piece: Callable[[str], None] | None = None) -> Iterator[Log]:
    """Catch the log until the end of the block. Not for several threads: the callback is global.

    An exception of `on_piece` cannot pass through C: it is raised at the end of the block.
    """
    native = library()
    log = Log(on_piece)
    failures: list[BaseException] = []

    def hear(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        try:
            log.add(level, text.decode(errors="replace"))
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    callback = native.llama_log_callback(hear)
    before, data = native.llama_log_callback(), ctypes.c_void_p()
    native.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    native.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        native.llama_log_set(before, data)
    if failures:
        raise failures[0]
