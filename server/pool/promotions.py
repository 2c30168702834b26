"""Which variant answers to a model's bare name, where that is no longer what models.yaml says.

One file, replaced at once: whoever reads it after a crash, at whatever moment, finds the old or the new name.
"""

from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from quant.files import replace_synced
from quant.locks import lock_file

KEPT = 20  # earlier variants that a rollback can reach


class Promoted(Struct, frozen=True):
    variant: str
    before: tuple[str, ...]  # newest last


class Promotions:
    def __init__(self, cache: Path) -> None:
        self._path = cache / "promotions.json"
        self._lock = cache / "locks" / "promotions"
        self._current = self._read()

    def of(self, model: str) -> Promoted | None:
        return self._current.get(model)

    def ignore(self, model: str) -> None:
        """Its promoted variant is gone. The file keeps the name: the variant may be built again."""
        self._current.pop(model, None)

    def promote(self, model: str, variant: str, instead_of: str) -> None:
        """Durable when it returns. Raises OSError, and then nothing has changed.

        `instead_of`: what answers where nothing was promoted. Where another promotion came first, the history
        has its variant.
        """
        with lock_file(self._lock):
            every = self._read()
            now = every.get(model)
            before = () if now is None else now.before
            last = now.variant if now is not None and model in self._current else instead_of
            if last != variant:
                self._write({**every, model: Promoted(variant, (*before, last)[-KEPT:])})

    def roll_back(self, model: str, to: str) -> None:
        """To this one of those that answered before: later ones are gone. Durable when it returns.

        Raises OSError; nothing changes where another rollback came first.
        """
        with lock_file(self._lock):
            every = self._read()
            now = every.get(model)
            if now is not None and to in now.before and to != now.variant:
                kept = len(now.before) - 1 - now.before[::-1].index(to)
                self._write({**every, model: replace(now, variant=to, before=now.before[:kept])})

    def _write(self, every: dict[str, Promoted]) -> None:
        replace_synced(self._path, msgspec.json.encode(every))
        self._current = every

    def _read(self) -> dict[str, Promoted]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Promoted])
        except (OSError, msgspec.DecodeError):
            return {}
