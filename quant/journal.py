"""Which stages of a build are done, written so that it is true after a crash or a power cut."""

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from quant.files import replace_synced, sync_file

JOURNAL = "journal.json"


class Done(Struct, frozen=True, kw_only=True, omit_defaults=True):
    file: str  # what the stage made, below the scratch folder
    bytes: int
    facts: dict[str, Any] = {}  # what else is worth knowing after a kill


class Journal:
    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._done = _load(scratch / JOURNAL)

    def __bool__(self) -> bool:
        """Whether an earlier process got somewhere."""
        return bool(self._done)

    def has(self, stage: str) -> bool:
        """True where the stage ended and its file is there in full."""
        done = self._done.get(stage)
        if done is None:
            return False
        try:
            return (self._scratch / done.file).stat().st_size == done.bytes
        except OSError:
            return False

    def facts(self, stage: str) -> dict[str, Any]:
        """What `add` was told of a stage that is done."""
        return self._done[stage].facts

    def add(self, stage: str, file: Path, facts: dict[str, Any] | None = None) -> None:
        """Call when `file` is complete: it is synced before the journal says so."""
        sync_file(file)
        name = file.relative_to(self._scratch).as_posix()
        self._done[stage] = Done(file=name, bytes=file.stat().st_size, facts=facts or {})
        replace_synced(self._scratch / JOURNAL, msgspec.json.encode(self._done))


def _load(path: Path) -> dict[str, Done]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Done])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
