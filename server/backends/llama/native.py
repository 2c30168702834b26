"""llama.cpp as a library inside this process: started once, its log in Python's logging.

Its messages are the only place where it says why something failed, so the last errors are kept for
whoever has to explain it.
"""

import ctypes
import logging
import re
from types import ModuleType

from quant.gguf.library import load_backends
from server.backends.llama.threads import limit_spinning

LOG = logging.getLogger(__name__)

WARNING, ERROR, CONTINUED = 3, 4, 5  # of ggml_log_level
LONGEST_LINE = 500
EXPECTED = "n_ctx_seq ("  # one memory for all sequences is larger than what one of them may grow to
WHERE = re.compile(r"^\w+: ")  # llama.cpp starts its lines with the name of the C++ function
FOLDERS = re.compile(r"(?<![\w.])/.*/")


class NativeLog:
    """Puts messages together to lines; passes warnings and errors on, drops the rest."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0
        self._text = ""

    def write(self, level: int, text: str) -> None:
        """One callback of llama.cpp. A line may come in several; CONTINUED goes on with the level before."""
        if level != CONTINUED:
            self._level = level
        if self._level not in (WARNING, ERROR):
            return
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        line = tidy(line)
        if not line or line.startswith(EXPECTED):
            return
        if self._level == ERROR:
            self.errors = [*self.errors[:7], line]
        LOG.log(logging.ERROR if self._level == ERROR else logging.WARNING, "%s", line)

    def reason(self, fallback: str) -> str:
        """The first error since `forget`: it is the cause, those after it only say what it led to."""
        return self.errors[0].removeprefix("error loading model: ") if self.errors else fallback

    def forget(self) -> None:
        self.errors = []


def tidy(line: str) -> str:
    """The line without function name and folders, cut to a length that a log or a client can take."""
    line = WHERE.sub("", line.strip())
    return FOLDERS.sub("", line)[:LONGEST_LINE]


NATIVE_LOG = NativeLog()
_kept: list[object] = []  # the callback must live as long as the library


def load_library() -> ModuleType:
    """The low-level API, ready for use. Cheap after the first call. Raises ImportError or OSError."""
    limit_spinning()
    from llama_cpp import llama_cpp

    if not _kept:
        callback = llama_cpp.llama_log_callback(_receive)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(None))
        load_backends(llama_cpp)
        llama_cpp.llama_backend_init()
        _kept.append(callback)
    library: ModuleType = llama_cpp
    return library


def _receive(level: int, text: bytes | None, _user_data: object) -> None:
    NATIVE_LOG.write(level, (text or b"").decode("utf-8", "replace"))
