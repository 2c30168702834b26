"""How child processes are started, told apart and tied to the life of their parent."""

import os
import signal
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

SECRET_ENDINGS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSPHRASE", "PASSWD", "CREDENTIAL")  # or with an S
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the packages


def python_module(module: str, *arguments: str) -> list[str]:
    """A command line; -P keeps the working folder, where anybody may have put files, off the module path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one: API keys, tokens, passwords."""
    return name.upper().removesuffix("S").endswith(SECRET_ENDINGS)


def child_environment(environ: Mapping[str, str], *, pulls: bool = False) -> dict[str, str]:
    """The environment for a child: our packages can be imported, whatever the working folder, and no secret
    is in it but the hub's token for a child that `pulls`."""
    kept = HUB_TOKENS if pulls else ()
    result = {name: value for name, value in environ.items() if name in kept or not is_secret(name)}
    if Path(sysconfig.get_paths()["purelib"]) != ROOT:
        path = environ.get("PYTHONPATH")
        result["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    return result


def engine_environment(environ: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """For engines: no network, and helper libraries that start no thread pools of their own.

    `threads` also bounds OpenMP, which reads it when it is loaded.
    """
    changes = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
    if threads is not None:
        changes["OMP_NUM_THREADS"] = str(threads)
    return child_environment({**environ, **changes})


def die_with(parent: int) -> None:
    """Let the kernel kill this process when `parent` ends, and end at once if it already has.

    The thread that started this process counts as the parent, so start children from the event loop's thread.
    """
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def describe_exit(returncode: int | None) -> str:
    """A returncode in words: "was killed by SIGSEGV", "exited with code 3"."""
    if returncode is None:
        return "closed its connection"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
