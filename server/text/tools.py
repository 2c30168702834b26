"""Functions that a model may call: how it is told of them, how it writes a call, how it is held to that.

A model whose template knows no functions is told of them by a system message of ours.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.engine.grammars import with_options
from server.text.formats import CONTROL, JSON, ToolFormat
from server.text.messages import Traits, flatten, parsed
from server.text.schemas import dump, settled
from server.text.vocabulary import Vocabulary

MOST_CALLS = 8  # that a forced answer may make
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Fields = dict[str, Any]


PROMPT = """\
You can call functions. To call one, answer only with JSON:
{"name": its name, "arguments": {its parameters}}
Functions:
"""


OTHER_PROMPT = """\
You can call functions. To call one, answer only with this, with its own name and parameters:
{example}
Functions:
"""
EXAMPLE = ("function_name", {"parameter_name": "value"})


def shown_tokens(vocabulary: Vocabulary, texts: Sequence[str] = CONTROL) -> frozenset[int]:
    """Control tokens that must be seen as text, since they mark calls."""
    found = {token for text in texts if (token := vocabulary.find(text)) is not None}
    return frozenset(found & vocabulary.control)


# -- telling --------------------------------------------------------------------------------------


def for_template(
    messages: list[Fields], tools: Sequence[Fields], format: ToolFormat, traits: Traits
) -> list[Fields]:
    """The messages as a template with these traits can show them, functions and calls included."""
    if not traits.tools:
        messages = told(messages, tools, format, shown=traits.calls)
    elif not traits.calls:
        messages = with_calls_written(messages, format)
    return messages if traits.system else without_system(messages)


def told(
    messages: Sequence[Fields], tools: Sequence[Fields], format: ToolFormat = JSON, *, shown: bool = False
) -> list[Fields]:
    """The messages for a template that knows no functions. `shown`: it shows calls, in the model's format."""
    if format is JSON or not shown:
        names = {
            call["id"]: call["function"]["name"]
            for message in messages
            for call in message.get("tool_calls") or ()
        }
        messages = [_spelt(message, names, format) for message in messages]
    return with_system(list(messages), introduction(tools, format)) if tools else list(messages)


def with_calls_written(messages: Sequence[Fields], format: ToolFormat) -> list[Fields]:
    """The messages for a template that tells of functions and does not show the calls that were made."""
    return [_written(message, format) if message.get("tool_calls") else message for message in messages]


def introduction(tools: Sequence[Fields], format: ToolFormat) -> str:
    lines = [
        dump({key: function[key] for key in ("name", "description", "parameters") if function.get(key)})
        for function in (tool["function"] for tool in tools)
    ]
    how = PROMPT if format is JSON else OTHER_PROMPT.format(example=format.write([EXAMPLE]))
    return how + "\n".join(lines)


def with_system(messages: list[Fields], text: str) -> list[Fields]:
    """`text` at the end of the first system message, or as one."""
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        return [{**first, "content": f"{flatten(first.get('content'), 'messages')}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_system(messages: list[Fields]) -> list[Fields]:
    """For templates that refuse system messages: the first one becomes the start of what the user says."""
    if [message["role"] for message in messages[:2]] not in (["system", "user"], ["developer", "user"]):
        return messages
    text, question = (flatten(message.get("content"), "messages") for message in messages[:2])
    return [{**messages[1], "content": f"{text}\n\n{question}"}, *messages[2:]]


def functions(calls: Sequence[Fields]) -> list[Fields]:
    return [call["function"] for call in calls]


def _written(message: Fields, format: ToolFormat) -> Fields:
    text = flatten(message.get("content"), "messages")
    calls: list[tuple[str, Any]] = [
        (one["name"], parsed(one["arguments"])) for one in functions(message["tool_calls"])
    ]
    if format is JSON or not all(isinstance(arguments, dict) for _, arguments in calls):
        lines = [f'{{"name": {dump(name)}, "arguments": {_json(arguments)}}}' for name, arguments in calls]
        text = "\n".join([*([text] if text else ()), *lines])
    else:
        text += format.write(calls)
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _spelt(message: Fields, names: Mapping[str, str], format: ToolFormat) -> Fields:
    if message["role"] in ("tool", "function"):
        name = message.get("name") or names.get(message.get("tool_call_id", ""), "the function")
        text = flatten(message.get("content"), "messages")
        return {"role": "user", "content": f"Result of {name}: {text}"}
    return _written(message, format) if message.get("tool_calls") else message


# -- holding --------------------------------------------------------------------------------------


def call_grammar(
    format: ToolFormat,
    tools: Sequence[Fields],
    vocabulary: Vocabulary,
    *,
    many: bool,
    instead: str | None = None,
) -> str:
    """A grammar in llguidance's Lark: calls of these functions, with arguments as they want them.

    `instead` is a JSON schema that an answer without calls follows.
    """

    def literals(*parts: str) -> str:
        return " ".join(filter(None, (literal(part, vocabulary) for part in parts)))

    more = f"({literals(format.between)} call){{0,{MOST_CALLS - 1}}}" if many and format.many else ""
    lines = [
        "start: calls" + ("" if instead is None else " | answer"),
        f"calls: {literals(*format.begin)} call {more} {literals(*format.end)}",
        "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        function = tool["function"]
        name = json.dumps(function["name"], ensure_ascii=False)[1:-1]
        *before, last = format.open
        joined = format.middle not in CONTROL
        rest = [last + name + format.middle] if joined else [last + name, format.middle]
        head = [*before, *rest]
        schema = with_options(settled(arguments_schema(function.get("parameters"))))
        lines.append(f"call{number}: {literals(*head)} args{number} {literals(*format.close)}")
        lines.append(f"args{number}: %json {schema}")
    if instead is not None:
        lines.append(f"answer: %json {with_options(instead)}")
    return "\n".join(lines)


def literal(part: str, vocabulary: Vocabulary) -> str:
    """A text for a grammar, or a control token by its id."""
    token = vocabulary.find(part) if part in CONTROL else None
    if token is not None and token in vocabulary.control:
        return f"<[{token}]>"
    return json.dumps(part, ensure_ascii=False) if part else ""


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments are an object, whatever the schema leaves open."""
    if not parameters:
        return NO_PARAMETERS
    return dict(parameters) if "type" in parameters else {"type": "object", **parameters}
