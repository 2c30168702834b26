"""Reads calls of functions out of an answer as it comes. Pure; what is no call stays text."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.text.formats import ToolFormat
from server.text.notations import DECODER, Schema
from server.text.reasoning import overlap

HEAD = re.compile(r'[^{]*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
BETWEEN = re.compile(
    r"(?:\[TOOL_CALLS\]|</?tool_call>|<\|tool_call\|>|<\|python_(?:tag|start|end)\|>|[\s,;\[\]])*"
)
KEYS = ('{"name":', '{"arguments":', '{"parameters":', '{"type":"function"', '{"function":', '{"id":')
BLANKS = re.compile(r"\s+")

LEADING = ("<|python_tag|>", "<|python_start|>")  # before a call that has no trigger
Functions = Mapping[str, Schema]  # by name, what their arguments are to be
NewId = Callable[[int], str]  # of so many characters


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of the call number `index`; its name and id come first, once."""

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None


@dataclass(slots=True)
class Found:
    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallReader(Protocol):
    """`push` and `flush` give text and calls in the order of the answer."""

    @property
    def unfinished(self) -> bool:
        """A call has begun whose arguments are not whole."""
        ...

    def push(self, text: str) -> Found: ...
    def flush(self) -> Found: ...


class ForcedCalls:
    """An answer that a grammar forces to be calls: arguments are given out as they come."""

    def __init__(self, format: ToolFormat, new_id: NewId) -> None:
        self._format, self._new_id = format, new_id
        self._head = forced_head(format) if format.bare else HEAD
        self._held = ""
        self._extent: Extent | None = None  # of the arguments that are being written
        self._calls = 0

    @property
    def unfinished(self) -> bool:
        return self._extent is not None

    def push(self, text: str) -> Found:
        found = Found()
        self._held += text
        while self._held:
            if self._extent is None and (head := self._head.match(self._held)) is None:
                break
            if self._extent is None:
                assert head is not None
                self._begin(head, found)
            elif not self._go_on(self._extent, found):
                break
        return found

    def flush(self) -> Found:
        return Found()

    def _begin(self, head: "re.Match[str]", found: Found) -> None:
        name = head[1] if self._format.bare else json.loads(f'"{head[1]}"')
        found.calls.append(CallDelta(self._calls, "", name, self._new_id(self._format.id_chars)))
        self._calls += 1
        self._held, self._extent = self._held[head.end() :], Extent()

    def _go_on(self, extent: "Extent", found: Found) -> bool:
        size = extent.push(self._held)
        found.calls.append(CallDelta(self._calls - 1, self._held[:size]))
        self._held = "" if size is None else self._held[size:]
        if size is not None:
            self._extent = None
        return size is not None


class Extent:
    """Where a JSON object that comes in pieces ends: only brackets and strings matter for that."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> int | None:
        """How much of `text` belongs to the object, once it ends there."""
        for place, char in enumerate(text, 1):
            if self._quoted:
                self._quoted = char != '"' or self._escaped
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return place
        return None


class FreeCalls:
    """An answer that may call: from what looks like a call on, it is held back and read at its end."""

    unfinished = False  # calls are given out whole

    def __init__(self, format: ToolFormat, functions: Functions, new_id: NewId, *, many: bool = True) -> None:
        self._format, self._functions, self._new_id, self._many = format, functions, new_id, many
        self._state = "looking"
        self._held = ""

    def push(self, text: str) -> Found:
        self._held += text
        if self._state == "looking":
            return Found(self._look_inside() if self._format.trigger else self._look_at_start())
        if self._state == "holding":
            return Found(self._doubt())
        return Found(self._take())

    def flush(self) -> Found:
        text = self._take()
        if self._state != "holding":
            return Found(text)
        calls, rest = read_calls(text, self._format, self._functions)
        found = [
            CallDelta(index, arguments, name, self._new_id(self._format.id_chars))
            for index, (name, arguments) in enumerate(calls if self._many else calls[:1])
        ]
        return Found(rest if calls else text, found)

    def _take(self, size: int | None = None) -> str:
        taken = self._held[:size]
        self._held = self._held[len(taken) :]
        return taken

    def _look_inside(self) -> str:
        place = self._held.find(self._format.trigger)
        if place >= 0:
            self._state = "holding"
            return self._take(place)
        return self._take(len(self._held) - overlap(self._held, self._format.trigger))

    def _look_at_start(self) -> str:
        rest = self._held[_end_of_marks(self._held) :]
        if not rest or (rest.startswith("<") and any(mark.startswith(rest) for mark in LEADING)):
            return ""
        self._state = "holding" if self._may_call(rest) else "over"
        return self._doubt() if self._state == "holding" else self._take()

    def _may_call(self, rest: str) -> bool:
        if not self._format.bare:
            return rest.startswith("{")
        heads = (name + self._format.middle for name in self._functions)
        return any(head.startswith(rest) or rest.startswith(head) for head in heads)

    def _doubt(self) -> str:
        """An object that begins with another key is an answer in JSON: no reason to wait for its end."""
        if self._format.trigger:
            return ""
        rest = self._held[_end_of_marks(self._held) :]
        if self._may_call(rest) and (self._format.bare or _may_be_call(BLANKS.sub("", rest[:64]))):
            return ""
        self._state = "over"
        return self._take()


def _may_be_call(start: str) -> bool:
    return any(start.startswith(key) or key.startswith(start) for key in KEYS)


def _end_of_marks(text: str, start: int = 0, marks: "re.Pattern[str]" = BETWEEN) -> int:
    found = marks.match(text, start)
    return found.end() if found else start


def forced_head(format: ToolFormat) -> "re.Pattern[str]":
    return re.compile(format.around.pattern + format.head.pattern + r"\s*(?=\{)")


def read_calls(text: str, format: ToolFormat, functions: Functions) -> tuple[list[tuple[str, str]], str]:
    """Names and arguments, as JSON, of the calls that `text` begins with, and what follows them."""
    calls: list[tuple[str, str]] = []
    marks = format.around if format.bare else BETWEEN
    place = _end_of_marks(text, 0, marks)
    while place < len(text):
        read = _bare_call(text, place, format, functions) if format.bare else _call(text, place)
        if read is None or read[0] not in functions:
            break
        calls.append(read[:2])
        place = _end_of_marks(text, read[2], marks)
    return calls, text[place:]


def _call(text: str, place: int) -> tuple[str, str, int] | None:
    """An object of a name and arguments in any order, or one that holds such an object as `function`."""
    try:
        value, end = DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = as_object(value.get("arguments", value.get("parameters", {})))
    return None if arguments is None else (value["name"], arguments, end)


def _bare_call(
    text: str, place: int, format: ToolFormat, functions: Functions
) -> tuple[str, str, int] | None:
    """A name, then arguments; and the end of it, without which JSON alone is known to be whole."""
    head = format.head.match(text, place)
    if head is None:
        return None
    read = format.arguments.read(text, head.end(), functions.get(head[1], {}))
    arguments = None if read is None else as_object(read[0])
    if read is None or arguments is None:
        return None
    tail = format.tail.match(text, read[1])
    if tail is None and format.forced is not format:
        return None
    return head[1], arguments, read[1] if tail is None else tail.end()


def as_object(value: Any) -> str | None:
    """Arguments as JSON of an object; some models write that JSON as a text."""
    if isinstance(value, str):
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            return None
    return as_json(value) if isinstance(value, dict) else None


def as_json(value: dict[str, Any]) -> str | None:
    """Half a surrogate is spelled out, as UTF-8 cannot hold it; for infinity, which JSON has not, None."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    except ValueError:
        return None
    return text
