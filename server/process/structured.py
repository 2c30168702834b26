"""How often a model answers in JSON, and calls a function, as it was asked to; no grammar forces it.

Sixteen short tasks of ours, greedy answers. What counts is form, keys and types, not what the answers say.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from server.text.calls import read_calls
from server.text.model import TextModel
from server.text.tools import Fields, for_template

TOKENS = 96  # of an answer at most
TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"string": (str,), "number": (int, float), "boolean": (bool,), "array": (list,)}
)


@dataclass(frozen=True, slots=True)
class Task:
    """`shape`: JSON types by key, of the object or of a call's arguments. `call`: the function's name."""

    prompt: str
    shape: Mapping[str, str]
    call: str | None = None


def _object(prompt: str, **shape: str) -> Task:
    keys = ", ".join(f'"{key}" ({kind})' for key, kind in shape.items())
    return Task(f"{prompt} Answer only with a JSON object that has the keys {keys}.", shape)


TASKS: tuple[Task, ...] = (
    _object("Describe a red apple.", name="string", colour="string"),
    _object("A cup of tea costs 3 euros.", drink="string", price="number"),
    _object("Is the sun a star?", answer="boolean"),
    _object("Name three days of the week.", days="array"),
    _object("Lena is 34 years old and lives in Graz.", name="string", age="number", city="string"),
    _object("Which language has the word 'bonjour'?", language="string"),
    _object("Rate the sentence 'I love this film' from 1 to 5.", rating="number", reason="string"),
    _object("How many legs has a spider?", animal="string", legs="number"),
    Task("What is the weather like in Oslo?", {"city": "string"}, "get_weather"),
    Task("Add 17 and 25.", {"a": "number", "b": "number"}, "add"),
    Task("Set a timer for ten minutes.", {"minutes": "number"}, "set_timer"),
    Task("Send Tom the message: I am late.", {"to": "string", "text": "string"}, "send_message"),
    Task("Turn the lamp in the kitchen on.", {"room": "string", "on": "boolean"}, "switch_lamp"),
    Task("Search for books about whales.", {"query": "string"}, "search_books"),
    Task("Play some jazz.", {"genre": "string"}, "play_music"),
    Task("Convert 20 dollars to euros.", {"amount": "number", "currency": "string"}, "convert"),
)


async def prompt_of(task: Task, text: TextModel) -> list[int]:
    """As the server would put it to the model."""
    tools, traits = [_tool(task)] if task.call else [], text.template.traits
    asked: Fields = {"role": "user", "content": task.prompt}
    messages = for_template([asked], tools, text.tool_format, traits)
    return await text.encode_chat(messages, tools=tools if tools and traits.tools else None)


def is_valid(task: Task, answer: str, text: TextModel) -> bool:
    if task.call is None:
        return _fits(_read(answer), task.shape)
    calls, _ = read_calls(_unmarked(answer, text), text.tool_format, {task.call: _schema(task)})
    return any(name == task.call and _fits(_read(arguments), task.shape) for name, arguments in calls)


def _unmarked(answer: str, text: TextModel) -> str:
    """From the mark on by which the model's format begins a call."""
    trigger = text.tool_format.trigger
    return answer[answer.find(trigger) :] if trigger and trigger in answer else answer


def _read(answer: str) -> object:
    """The answer as JSON; a fence around it is what many models write, and every client takes off."""
    bare = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return json.loads(bare)
    except (ValueError, RecursionError):
        return None


def _fits(value: object, shape: Mapping[str, str]) -> bool:
    return isinstance(value, dict) and all(_is_a(value.get(key), kind) for key, kind in shape.items())


def _is_a(value: object, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _schema(task: Task) -> Fields:
    properties = {key: {"type": kind} for key, kind in task.shape.items()}
    return {"type": "object", "properties": properties, "required": list(task.shape)}


def _tool(task: Task) -> Fields:
    function = {"name": task.call, "parameters": _schema(task)}
    return {"type": "function", "function": function}


def rates(valid: Sequence[bool]) -> tuple[float, float]:
    """Of answers to TASKS: the share of those in JSON, and of those that call."""
    kinds = [task.call is not None for task in TASKS]
    pairs = list(zip(kinds, valid, strict=True))
    shares = [
        sum(good for kind, good in pairs if kind is wanted) / kinds.count(wanted) for wanted in (False, True)
    ]
    return shares[0], shares[1]
