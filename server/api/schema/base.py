"""What every request model shares: strict types, and a place for fields that it does not define."""

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr
from pydantic.fields import FieldInfo

from server.errors import RequestError, UnsupportedParameter

# OpenAI's fields that steer no token: taken, and named in X-Ignored-Params like unknown ones.
BOOKKEEPING = frozenset(
    {
        "metadata",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


class Loose(BaseModel):
    """Strict about the fields it knows; keeps the others, so that the answer can name them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class Body(Loose):
    """A whole request. `UNSUPPORTED` maps a parameter that is defined, but cannot be honoured yet, to the
    values that ask for nothing and may pass."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    _sent: dict[str, str] = PrivateAttr(default_factory=dict)  # fields that came by another name

    def sent_as(self, names: Collection[str]) -> None:
        """Keeps by which of its names each parameter came. `names`: those of the request."""
        for field, info in type(self).model_fields.items():
            if field not in names:
                self._sent.update((field, one) for one in other_names(field, info) if one in names)

    def called(self, field: str) -> str:
        """The client's name for a parameter: what an error calls it."""
        return self._sent.get(field, field)

    def refuse_unsupported(self) -> None:
        """Raises RequestError, UnsupportedParameter."""
        fields = type(self).model_fields.items()
        second = {one: field for field, info in fields for one in other_names(field, info)}
        for name, value in (self.model_extra or {}).items():
            if name in second and not _same(value, getattr(self, second[name])):
                raise RequestError(f"{name}: is given by another name, too", param=name)
            if name in self.UNSUPPORTED and value not in self.UNSUPPORTED[name]:
                raise UnsupportedParameter(f"{name}: not supported by this server", param=name)

    def ignored(self) -> list[str]:
        """Names of the fields that had no effect, nested ones as `messages.name`, without repeats."""
        names = dict.fromkeys(_extras(self, ""))
        return [name for name in names if name not in self.UNSUPPORTED]


def defined(value: Any) -> Any:
    """What a client sent, as JSON, but for the fields that nobody defines."""
    match value:
        case BaseModel():
            fields = type(value).model_fields.items()
            return {info.alias or name: defined(value.__dict__[name]) for name, info in fields}
        case list():
            return [defined(item) for item in value]
        case _:
            return value


@cache
def field_names() -> frozenset[str]:
    """Every parameter of every request, nested ones too: names that an error may repeat."""
    waiting, names = [Loose], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        for name, info in kind.model_fields.items():
            alone = {info.validation_alias} if isinstance(info.validation_alias, str) else set()
            names |= {name, *alone, *other_names(name, info)}
    return frozenset(names)


def _same(value: Any, known: Any) -> bool:
    """Some clients send a parameter by every name that servers have for it."""
    return type(value) is type(known) and bool(value == known)


def other_names(name: str, info: FieldInfo) -> list[str]:
    """By which a client may call a field as well."""
    choices = getattr(info.validation_alias, "choices", ())
    return [one for one in choices if isinstance(one, str) and one != name]


def text_or(things: str) -> BeforeValidator:
    """Of a union of a text and a list: says so, where a value is neither or the list is empty."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            raise ValueError(f"must be a text or a list of {things}")
        return value

    return BeforeValidator(check)


def _extras(value: Any, prefix: str) -> Iterator[str]:
    match value:
        case BaseModel():
            yield from (prefix + name for name in value.model_extra or ())
            for name in type(value).model_fields:
                yield from _extras(value.__dict__[name], f"{prefix}{name}.")
        case list():
            for item in value:
                yield from _extras(item, prefix)
