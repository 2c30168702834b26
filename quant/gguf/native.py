"""llama.cpp's C interface, imported late, and what it says while it works.

llama.cpp logs through one callback of the process. Here its lines are caught instead of printed, because the
reason of a failure is only in them.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

ERROR, CONTINUED = 3, 5  # ggml_log_level


@cache
def library() -> ModuleType:
    """llama_cpp's low-level module, ready for use. Raises ImportError where it is not installed."""
    import llama_cpp.llama_cpp as native

    module: ModuleType = native
    module.llama_backend_init()
    return module


class Log:
    """Lines of llama.cpp, put together from the pieces that its callback gets."""

    def __init__(self, on_start: Callable[[str], None] | None = None) -> None:
        self.errors: list[str] = []
        self._on_start = on_start or (lambda _: None)
        self._level = 0
        self._line = ""

    def add(self, level: int, text: str) -> None:
        """`on_start` hears a line as soon as its first piece is there: long work happens in the midst of lines."""
        if level != CONTINUED and not self._line:
            self._level = level
        if not self._line and text.strip():
            self._on_start(text)
        self._line += text
        if self._line.endswith("\n"):
            self._end()

    def _end(self) -> None:
        if self._level == ERROR and (line := self._line.strip(" \n=")):
            self.errors.append(line)
        self._line = ""


@contextmanager
def captured(on_start: Callable[[str], None] | None = None) -> Iterator[Log]:
    """Catch the log until the end of the block. Not for several threads: the callback is global.

    An exception of `on_start` cannot pass through C: it is raised at the end of the block.
    """
    native = library()
    log = Log(on_start)
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
