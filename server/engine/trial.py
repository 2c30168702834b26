"""`python -m server.engine.trial`: compiles grammars of strangers, so that the engine need not fear them.

A grammar of a few bytes can keep its compiler busy for hours, fill the memory or end the process. Here that
hurts nobody: the engine ends a trial that takes too long, and a trial that the engine forgot ends itself.
`Trial` is the engine's side.
"""

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from typing import BinaryIO

import msgspec

from server.engine.constrain import TOO_COMPLEX, GrammarConstraint, Words
from server.engine.grammars import complaint, matcher_of, tokenizer_of

LIMIT_S = 1.0  # for one grammar
START_S = 60.0  # for the process to be ready
MEMORY_BYTES = 4 << 30  # of address space

_HEAD = struct.Struct("!I")
_WORDS = msgspec.msgpack.Decoder(tuple[tuple[bytes, ...], frozenset[int], frozenset[int]])


class Trial:
    """Not safe for several threads."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    def refusal(self, source: str) -> str | None:
        """Why this grammar (server.engine.grammars.source_of) cannot be used, or None where it can."""
        process = self._running()
        if process is None:
            return "grammars cannot be compiled now"
        answer = None if not _send(process, source.encode()) else _receive(process, LIMIT_S)
        if answer is None:
            self.close()
            return "it takes too long or too much memory to compile"
        return answer.decode() or None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes] | None:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.engine.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            words = (self._words.pieces, self._words.control, self._words.ends)
            if not _send(self._process, msgspec.msgpack.encode(words)) or (
                _receive(self._process, START_S) is None
            ):
                self.close()
        return self._process


def _send(process: subprocess.Popen[bytes], body: bytes) -> bool:
    assert process.stdin is not None
    try:
        view = memoryview(_HEAD.pack(len(body)) + body)
        while view:
            view = view[process.stdin.write(view) :]
    except OSError:
        return False
    return True


def _receive(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One frame, or None where it has not come in time or will not come."""
    assert process.stdout is not None
    descriptor, deadline = process.stdout.fileno(), time.monotonic() + seconds
    data, size = b"", _HEAD.size
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        if not (part := os.read(descriptor, size - len(data))):
            return None
        data += part
        if len(data) == _HEAD.size == size:
            size += _HEAD.unpack(data)[0]
    return data[_HEAD.size :]


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(_HEAD.size)
    return stream.read(_HEAD.unpack(head)[0]) if len(head) == _HEAD.size else None


def _write(stream: BinaryIO, body: bytes) -> None:
    stream.write(_HEAD.pack(len(body)) + body)
    stream.flush()


def main(commands: BinaryIO, answers: BinaryIO) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if (body := _read(commands)) is None:
        return
    words = Words(*_WORDS.decode(body))
    tokenizer = tokenizer_of(words)
    _write(answers, b"")
    while (body := _read(commands)) is not None:
        signal.setitimer(signal.ITIMER_REAL, 4 * LIMIT_S)  # its default action ends native code, too
        matcher = matcher_of(body.decode(), tokenizer)
        error = complaint(matcher.get_error()) if matcher.is_error() else None
        if error is None:
            first = GrammarConstraint(matcher, words.ends)
            error = None if first.mask() is not None else first.error or TOO_COMPLEX
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, (error or "").encode())


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
