"""`python -m server.process.worker FD [PARENT]`: one engine, one process.

FD is our end of the socket pair and PARENT the process id of the web process. The first command says what to
open. Everything ends when the web process does: by the kernel's signal, and by the end of file on the socket.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from server.backends import registry
from server.backends.base import Opened
from server.engine.compiler import Compiler
from server.engine.constrain import Words
from server.engine.loop import EngineLoop
from server.errors import OpenError, ServerError
from server.process.child import die_with
from server.process.wire import EngineSocket
from server.types import Loading, ModelText, Open, OpenFailed, Ready

LOADING_STEP = 0.01  # loading is reported in steps of one hundredth


def main(fd: int, parent: int) -> int:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the web process, which drains
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump of the weights would delay the news of a crash
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    wire = EngineSocket(sock, gone=_leave)
    threading.Thread(target=wire.listen, daemon=True, name="commands").start()
    spec = wire.take()
    if not isinstance(spec, Open):
        return 2
    opened = _open(spec, wire)
    if opened is None:
        return 1
    embedder = opened.embedder
    wire.send(
        Ready(
            limits=opened.executor.limits,
            backend=spec.backend,
            text=opened.text,
            embedding=None if embedder is None else embedder.width,
        )
    )
    EngineLoop(
        opened.executor,
        wire,
        wire.send,
        tokenize=opened.tokenize,
        embedder=embedder,
        compiler=Compiler(partial(_words, spec, opened.text)),
    ).run()
    return 0


def _words(spec: Open, text: ModelText | None) -> Words:
    """The vocabulary for grammars: the engine's own, or the one beside the model. Raises OpenError."""
    if text is not None:
        return Words(text.pieces, frozenset(text.control), frozenset(text.end_ids))
    from server.text.model import TextModel  # a few MB, and only where a grammar comes

    model = TextModel.from_folder(Path(spec.variant))
    return Words(model.pieces, model.control, model.end_ids)


def _leave() -> None:
    os._exit(0)  # also out of a native call in another thread: nobody is left to answer


def _open(spec: Open, wire: EngineSocket) -> Opened | None:
    try:
        return registry.load(spec.backend).open(spec, _reporter(wire))
    except ServerError as error:
        wire.send(OpenFailed(code=error.code, message=str(error)))
    except Exception as error:  # noqa: BLE001  a backend's bug must reach the one who waits, too
        traceback.print_exc()
        kind = type(error).__name__
        wire.send(OpenFailed(code=OpenError.code, message=f"the backend failed while opening it ({kind})"))
    return None


def _reporter(wire: EngineSocket) -> Callable[[float], None]:
    sent = -1.0

    def report(done: float) -> None:
        nonlocal sent
        if done >= sent + LOADING_STEP:
            sent = done
            wire.send(Loading(done=done))

    return report


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.getppid()))
