"""Typed look-ups in a config.json, which anybody may have written."""

import math
from collections.abc import Mapping
from typing import Any

from quant.errors import BadSource

LARGEST = 2**31 - 1  # llama.cpp keeps sizes in 32 bits


class Fields:
    """Values with the defaults of the model's class below them; null is a value, and means "none".

    Wrong types raise BadSource with the key.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "config.json"
    ) -> None:
        self._values = {**defaults, **values}
        self._where = where

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str) -> int:
        value = self._values.get(key)
        if type(value) is not int or not 0 < value <= LARGEST:
            raise BadSource(f"{self._where}: {key} must be a whole number above 0, not {value!r:.80}")
        return value

    def number(self, key: str) -> float:
        value = self._values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise BadSource(f"{self._where}: {key} must be a number above 0, not {value!r:.80}")

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise BadSource(f"{self._where}: {key} must be true or false, not {value!r:.80}")
        return value

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise BadSource(f"{self._where}: {key} must be a text, not {value!r:.80}")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        value = self._values.get(key) or {}
        if not isinstance(value, Mapping):
            raise BadSource(f"{self._where}: {key} must be an object, not {value!r:.80}")
        return value

    def words(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise BadSource(f"{self._where}: {key} must be a list of texts, not {value!r:.80}")
        return tuple(value)

    def bits(self, key: str) -> tuple[bool, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(bit in (0, 1) for bit in value):
            raise BadSource(f"{self._where}: {key} must be a list of 0 and 1, not {value!r:.80}")
        return tuple(bool(bit) for bit in value)

    def indices(self, key: str) -> tuple[int, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(type(index) is int for index in value):
            raise BadSource(f"{self._where}: {key} must be a list of whole numbers, not {value!r:.80}")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(
            isinstance(number, int | float) and 0 < number < math.inf for number in value
        ):
            raise BadSource(f"{self._where}: {key} must be a list of numbers above 0, not {value!r:.80}")
        return tuple(float(number) for number in value)
