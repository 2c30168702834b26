"""How models write the arguments of a call. Each notation writes and reads; the one undoes the other."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Arguments = dict[str, Any]
Schema = Mapping[str, Any]  # of the function's parameters; empty where nothing is known

MAX_DEPTH = 64
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
KEY = re.compile(r"[^\W\d][\w.$-]*")
WORD = re.compile(r"[A-Za-z]+")
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|\n|.)", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}


class Notation(Protocol):
    def write(self, arguments: Arguments) -> str: ...

    def read(self, text: str, place: int, schema: Schema) -> tuple[Arguments, int] | None:
        """What stands at `place`, and where it ends. None for what this notation cannot have written."""
        ...


class NotThis(ValueError):
    """The text is no value in this notation."""


def _no_constant(name: str) -> float:
    raise NotThis(name)


DECODER = json.JSONDecoder(parse_constant=_no_constant)  # JSON has neither NaN nor Infinity


@dataclass(frozen=True)
class Json:
    def write(self, arguments: Arguments) -> str:
        return json.dumps(arguments, ensure_ascii=False)

    def read(self, text: str, place: int, schema: Schema) -> tuple[Arguments, int] | None:
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        return (value, end) if isinstance(value, dict) else None


@dataclass(frozen=True)
class Parameters:
    """`open` NAME `middle` VALUE `close`, one after the other; `last` follows. Texts stand as they are.

    A text that holds `close` before another `open` or `last` cannot be told from two parameters.
    """

    open: str
    middle: str
    close: str
    last: str

    def write(self, arguments: Arguments) -> str:
        return "".join(
            self.open + name + self.middle + _plain(value) + self.close for name, value in arguments.items()
        )

    def read(self, text: str, place: int, schema: Schema) -> tuple[Arguments, int] | None:
        found: Arguments = {}
        declared = schema.get("properties")
        known = declared if isinstance(declared, Mapping) else {}
        while part := self._pattern.match(text, place):
            found[part[1]] = typed(part[2], known.get(part[1]))
            place = part.end()
        return found, place

    @property
    def _pattern(self) -> "re.Pattern[str]":
        open, last = loose(self.open), loose(self.last)
        middle, close = loose(self.middle.rstrip("\n")), loose(self.close.strip("\n"))
        before = r"\n?" if self.middle.endswith("\n") else ""
        after = r"\n?" if self.close.startswith("\n") else ""
        return re.compile(
            rf"\s*{open}([^<>\n\"]{{1,256}}){middle}{before}(.*?){after}{close}(?=\s*(?:{open}|{last}))",
            re.DOTALL,
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def typed(text: str, schema: Any) -> Any:
    """A value as its schema wants it: a text where it may only be that, else JSON where it can be."""
    if isinstance(schema, Mapping) and _only_text(schema):
        return text
    if text in LITERALS:  # as templates print them
        return LITERALS[text]
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _printed(text)


def _printed(text: str) -> Any:
    """A list or an object as Python prints it; else the text."""
    reader = _Literals(PYTHON, text, 0)
    try:
        value = reader.value(0) if text[:1] in ("[", "{") else text
    except ValueError:
        return text
    return value if reader.place in (0, len(text)) else text


def _only_text(schema: Schema) -> bool:
    if schema.get("type") is not None:
        return bool(schema["type"] == "string")
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
    return all(isinstance(value, str) for value in values)


@dataclass(frozen=True)
class Keywords:
    """NAME `mark` VALUE with commas between, up to a closing bracket. Values are literals."""

    mark: str
    quote: str | None = None  # around texts that stand as they are; None: Python's strings
    separator: str = ", "
    words: Mapping[str, Any] = field(default_factory=dict, hash=False)  # the first for a value is written

    def write(self, arguments: Arguments) -> str:
        return self.separator.join(
            name + self.mark + self._literal(value) for name, value in arguments.items()
        )

    def read(self, text: str, place: int, schema: Schema) -> tuple[Arguments, int] | None:
        reader = _Literals(self, text, place)
        try:
            return reader.pairs(")}", self.mark, depth=0), reader.place
        except ValueError:  # NotThis, or a number of too many digits
            return None

    def _literal(self, value: Any) -> str:
        match value:
            case str():
                return repr(value) if self.quote is None else self.quote + value + self.quote
            case None | bool():
                return next(word for word, meant in self.words.items() if meant is value)
            case list():
                return "[" + self.separator.join(map(self._literal, value)) + "]"
            case dict():
                return "{" + self.separator.join(self._pairs(value)) + "}"
            case _:
                return repr(value)

    def _pairs(self, value: Arguments) -> Iterable[str]:
        colon = ": " if self.quote is None else ":"
        return (
            (repr(key) if self.quote is None else key) + colon + self._literal(item)
            for key, item in value.items()
        )


class _Literals:
    """Reads values from `place` on, which moves. Raises NotThis."""

    def __init__(self, notation: Keywords, text: str, place: int) -> None:
        self._notation, self._text, self.place = notation, text, place

    def pairs(self, closes: str, mark: str, depth: int) -> Arguments:
        """Up to one of `closes`, which is not taken."""
        found: Arguments = {}
        while not self._at(closes):
            key = self._key(quoted=depth > 0)
            self._take(mark)
            found[key] = self.value(depth + 1)
            if not self._at(closes):
                self._take(",")
        return found

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise NotThis
        quote = self._quote()
        if quote is not None:
            return self._string(quote)
        if self._at("["):
            return self._items(depth)
        if self._at("{"):
            self.place += 1
            found = self.pairs("}", ":", depth + 1)
            self._take("}")
            return found
        return self._number() if self._at("-0123456789") else self._word()

    def _items(self, depth: int) -> list[Any]:
        self._take("[")
        items = []
        while not self._at("]"):
            items.append(self.value(depth + 1))
            if not self._at("]"):
                self._take(",")
        self._take("]")
        return items

    def _key(self, *, quoted: bool) -> str:
        self._at("")
        quote = self._quote() if quoted else None
        if quote is not None:
            return self._string(quote)
        pattern = KEY if not quoted or self._notation.quote is not None else None
        found = pattern.match(self._text, self.place) if pattern else None
        if found is None:
            raise NotThis
        self.place = found.end()
        return found[0]

    def _quote(self) -> str | None:
        """The mark around the text that begins here, if one does."""
        self._at("")
        own = self._notation.quote
        quotes = ('"', "'") if own is None else (own, '"')
        return next((quote for quote in quotes if self._text.startswith(quote, self.place)), None)

    def _string(self, quote: str) -> str:
        self.place += len(quote)
        if quote == self._notation.quote:
            inner, mark, _ = self._text[self.place :].partition(quote)
            if not mark:
                raise NotThis
            self.place += len(inner) + len(mark)
            return inner
        found = re.compile(rf"((?:[^{quote}\\]|\\.)*+){quote}", re.DOTALL).match(self._text, self.place)
        if found is None:
            raise NotThis
        self.place = found.end()
        return unescaped(found[1])

    def _number(self) -> int | float:
        found = NUMBER.match(self._text, self.place)
        if found is None:
            raise NotThis
        self.place = found.end()
        number = float(found[0]) if found[1] or found[2] else int(found[0])
        if not math.isfinite(number):
            raise NotThis
        return number

    def _word(self) -> Any:
        found = WORD.match(self._text, self.place)
        if found is None or found[0] not in self._notation.words:
            raise NotThis
        self.place = found.end()
        return self._notation.words[found[0]]

    def _at(self, chars: str) -> bool:
        """Whether one of these is next, after blanks."""
        while self.place < len(self._text) and self._text[self.place].isspace():
            self.place += 1
        return self.place < len(self._text) and self._text[self.place] in chars

    def _take(self, mark: str) -> None:
        if not self._at(mark[0]) or not self._text.startswith(mark, self.place):
            raise NotThis
        self.place += len(mark)


def unescaped(text: str) -> str:
    """Python's escapes, and JSON's pairs of surrogates. An escape that is none stays as it is."""

    def char(found: "re.Match[str]") -> str:
        code = found[1]
        if code[0] in "xuU" and len(code) > 1:
            return chr(int(code[1:], 16)) if int(code[1:], 16) <= 0x10FFFF else found[0]
        if code[0] in "01234567":
            return chr(int(code, 8))
        return ESCAPED.get(code, code if code in "\\\"'" else found[0])

    return ESCAPE.sub(char, text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def loose(text: str) -> str:
    """An expression for `text` in which blanks may be more, fewer or none."""
    return r"\s*".join(map(re.escape, re.split(r"\s+", text)))


LITERALS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
PLAIN_WORDS = {"true": True, "false": False, "None": None, "null": None, "True": True, "False": False}
JSON_OBJECT = Json()
PYTHON = Keywords(mark="=", words=LITERALS)
GEMMA_4 = Keywords(mark=":", quote='<|"|>', separator=",", words=PLAIN_WORDS)
FUNCTION_GEMMA = Keywords(mark=":", quote="<escape>", separator=",", words=PLAIN_WORDS)
QWEN_CODER = Parameters("<parameter=", ">\n", "\n</parameter>\n", last="</function>")
SEED = Parameters("<parameter=", ">", "</parameter>\n", last="</function>")
GLM = Parameters("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", last="</tool_call>")
MINIMAX = Parameters('<parameter name="', '">', "</parameter>\n", last="</invoke>")
