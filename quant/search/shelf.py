"""Where a search keeps what it has found out, so that a killed one goes on and a later one starts with it.

<cache>/searches/<key>/alone.json     what groups cost alone: for every target
                       guesses.json   what toolkits would have guessed instead
                       <target>.json  what was tried for one target
                       probe.gguf, probes/   the mixture that is being scored
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from quant.canonical import canonical_digest
from quant.files import replace_synced
from quant.locks import lock_file, try_lock_file
from quant.search.evidence import Evidence, Probe
from quant.search.target import Target

PROBE, PROBES = "probe.gguf", "probes"
VERSION = 1  # raised when the same search would find other figures


class SearchShelf:
    """`what` says all that figures depend on, but for the target."""

    def __init__(self, cache: Path, what: list[object], target: Target) -> None:
        key = canonical_digest([VERSION, *what])[:32]
        self.folder = cache / "searches" / key
        self._alone = self.folder / "alone.json"
        self._guesses = self.folder / "guesses.json"
        self._own = self.folder / f"{canonical_digest(msgspec.to_builtins(target))[:16]}.json"
        self._lock = cache / "locks" / f"search-{key}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process searches at a time; what a killed one was scoring is removed."""
        with lock_file(self._lock):
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_probes(self.folder)
            yield

    def load(self) -> Evidence:
        own = _read(self._own)
        alone = tuple(one for one in _read(self._alone).probes if one.alone)
        return Evidence(own.tries, (*alone, *own.mixtures))

    def guesses(self) -> dict[str, dict[str, float]] | None:
        """None where they are still to be made: no target changes them."""
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._guesses.read_bytes(), type=dict[str, dict[str, float]])
        return None

    def save_guesses(self, found: Mapping[str, Mapping[str, float]]) -> None:
        """Raises OSError."""
        replace_synced(self._guesses, msgspec.json.encode(found))

    def save(self, evidence: Evidence) -> None:
        """Raises OSError."""
        alone: tuple[Probe, ...] = tuple(one for one in evidence.probes if one.alone)
        replace_synced(self._alone, msgspec.json.encode(Evidence(probes=alone)))
        replace_synced(self._own, msgspec.json.encode(Evidence(evidence.tries, evidence.mixtures)))


def sweep(cache: Path) -> None:
    """Remove what killed searches were scoring; those that run are left alone."""
    for folder in (cache / "searches").glob("*/"):
        with try_lock_file(cache / "locks" / f"search-{folder.name}") as mine:
            if mine:
                _remove_probes(folder)


def _remove_probes(folder: Path) -> None:
    (folder / PROBE).unlink(missing_ok=True)
    shutil.rmtree(folder / PROBES, ignore_errors=True)


def _read(path: Path) -> Evidence:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Evidence)
    return Evidence()
