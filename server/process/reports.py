"""What a build process tells those who watch it: a file that is replaced while it works, and a last line."""

import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from quant.search.found import Found


class Problem(Struct, frozen=True):
    code: str
    message: str


class BuildReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress file. Unlike the last line, it may be seconds old."""

    state: Literal["running", "done", "failed"] = "running"
    stage: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    eta_s: float | None = None
    last: str = ""  # what was done last, in a few words
    notes: tuple[str, ...] = ()  # what a user should know, in the order in which it was found
    variant: str | None = None  # key, as soon as the source is known
    error: Problem | None = None


class BuildAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last line of standard output: either `error` or all the others."""

    outcome: Literal["built", "cached", "pulled", "measured", "searched"] | None = None
    key: str | None = None  # of the variant; of a pull, the source's digest
    variant: str | None = None  # the variant's folder
    found: Found | None = None  # by a search, with or without a winner
    error: Problem | None = None


def replace_json(path: Path, value: Struct) -> None:
    """Whoever reads `path` sees the old or the new value whole. Raises OSError."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(msgspec.json.encode(value))
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def read_report(path: Path) -> BuildReport | None:
    """None where there is none yet, or nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BuildReport)
    except (OSError, msgspec.DecodeError):
        return None


def read_answer(output: bytes) -> BuildAnswer | None:
    """The last line of a build process's output; None where it did not get that far."""
    lines = output.splitlines()
    try:
        answer = msgspec.json.decode(lines[-1] if lines else b"", type=BuildAnswer)
    except msgspec.DecodeError:
        return None
    return answer if answer.error or answer.found or (answer.outcome and answer.key) else None
