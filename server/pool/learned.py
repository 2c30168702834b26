"""What engines really held, and how long they took to load: <cache>/memory.json, which may be lost."""

import contextlib
import logging
from pathlib import Path

import msgspec
from msgspec import Struct

from server.process.reports import replace_json

log = logging.getLogger(__name__)

FILE = "memory.json"
MOST = 1000  # entries; the oldest go first
MARGIN = 1.06  # over the most that was seen
CHANGE = 0.02  # smaller ones are not worth a write


class Seen(Struct, frozen=True):
    bytes: dict[str, int]  # the most, by device
    load_s: float


class Table(Struct, frozen=True):
    engines: dict[str, Seen] = {}


class Learned:
    def __init__(self, cache: Path) -> None:
        self._path = cache / FILE
        self._seen = dict(_load(self._path).engines)
        self._dirty = False

    def need(self, key: str, estimated: dict[str, int]) -> dict[str, int]:
        """The estimate, corrected where an engine of this kind was seen."""
        seen = self._seen.get(key)
        if seen is None:
            return estimated
        known = {device: int(MARGIN * amount) for device, amount in seen.bytes.items()}
        return {**estimated, **known}

    def largest(self, variant: str, device: str) -> int:
        """The same of the variant's largest engine that was seen, with whatever context; 0 for none."""
        keys = [key for key in self._seen if key.startswith(f"{variant} ")]
        return int(MARGIN * max((self._seen[key].bytes.get(device, 0) for key in keys), default=0))

    def load_s(self, key: str, need: int) -> float:
        """Seconds to load it; unknown ones at the rate of a slow disk."""
        seen = self._seen.get(key)
        return seen.load_s if seen else 1.0 + need / 500e6

    def add(self, key: str, held: dict[str, int], load_s: float) -> None:
        """`held`: the most since it was loaded. A smaller figure than before wins slowly: loads differ."""
        seen = self._seen.pop(key, None)
        if seen is not None:
            held = {
                device: max(amount, (3 * seen.bytes.get(device, amount) + amount) // 4)
                for device, amount in held.items()
            }
        changed = seen is None or any(
            abs(amount - seen.bytes.get(device, 0)) > CHANGE * amount for device, amount in held.items()
        )
        self._seen[key] = Seen(held, round(load_s, 2)) if changed or seen is None else seen
        self._dirty |= changed
        while len(self._seen) > MOST:
            del self._seen[next(iter(self._seen))]

    def save(self) -> None:
        if not self._dirty:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self._path, Table(self._seen))
            self._dirty = False


def _load(path: Path) -> Table:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Table)
    except (OSError, msgspec.DecodeError):
        return Table()
