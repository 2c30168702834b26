"""Reading a `quantization_config`, which may be anybody's: a surprise is a BadSource that names the field."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from quant.errors import BadSource
from quant.files import shown
from quant.patterns import is_plain

Config = Mapping[str, Any]


def unread(field: str, value: object, read: str) -> NoReturn:
    """`read`: what the reader does take."""
    raise BadSource(f"quantization_config: {field} {shown(value)} is not supported, only {read}")


def only(config: Config, field: str, *values: object) -> None:
    """An absent field is as good as the first of the values."""
    value = config.get(field, values[0])
    if not any(type(value) is type(one) and value == one for one in values):
        unread(field, value, " or ".join(str(one) for one in values))


def whole(config: Config, field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if type(value) is not int:
        unread(field, value, "a whole number")
    return value


def flag(config: Config, field: str, default: bool) -> bool:
    value = config.get(field, default)
    if type(value) is not bool:
        unread(field, value, "true or false")
    return value


def group_size(config: Config, default: int | None = None) -> int | None:
    """None for -1: the whole row."""
    size = whole(config, "group_size", default)
    if size != -1 and size < 1:
        unread("group_size", size, "-1 or a positive number")
    return None if size == -1 else size


def table(config: Config, field: str) -> Config:
    """Empty where the field is absent or null."""
    value = config.get(field)
    if value is not None and not isinstance(value, Mapping):
        unread(field, value, "an object")
    return value or {}


def texts(config: Config, field: str) -> tuple[str, ...]:
    """Empty where the field is absent or null."""
    value = config.get(field)
    if value is None:
        return ()
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(x, str) for x in value)
    ):
        unread(field, value, "a list of texts")
    return tuple(value)


def starts(pattern: str, name: str) -> bool:
    """Whether the regular expression matches the beginning of a module's name."""
    if not is_plain(pattern):
        unread("pattern", pattern, "short regular expressions without lookarounds and repeated groups")
    return re.match(pattern, name) is not None
