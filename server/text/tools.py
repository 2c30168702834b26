"""Functions that a model may call: how it is told of them, how it writes a call, how it is held to that.

Each way of writing calls is a row of FORMATS. A model's own is found in its chat template; a model whose
template knows no functions is told of them by a system message of ours, and answers in the first format.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.grammars import with_options
from server.text.messages import flatten
from server.text.schemas import dump, settled
from server.text.vocabulary import Vocabulary

MOST_CALLS = 8  # that a forced answer may make
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """An answer is `begin`, calls with `between` between them, `end`.

    A call is `open` NAME `middle` ARGUMENTS `close`. What is in parts may hold a control token as a part.
    """

    name: str
    marks: tuple[str, ...]  # a chat template that holds all of them speaks this format
    begin: tuple[str, ...] = ()
    open: tuple[str, ...] = ('{"name": "',)
    middle: str = '", "arguments": '
    close: tuple[str, ...] = ("}",)
    between: str = ""
    end: str = ""
    trigger: str = ""  # what tells a call from text; without one, a call stands at the start of an answer
    many: bool = True  # an answer that is forced to call may call several times
    bare: bool = False  # the name stands outside of the JSON
    id_chars: int = 24  # of a call's id


JSON = ToolFormat(name="json", marks=(), between="\n", many=False)
FORMATS = (
    ToolFormat(
        name="mistral-args",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        open=("[TOOL_CALLS]", ""),
        middle="[ARGS]",
        close=(),
        trigger="[TOOL_CALLS]",
        bare=True,
        id_chars=9,
    ),
    ToolFormat(
        name="mistral",
        marks=("[TOOL_CALLS]",),
        begin=("[TOOL_CALLS]", "["),
        between=", ",
        end="]",
        trigger="[TOOL_CALLS]",
        id_chars=9,
    ),
    ToolFormat(
        name="hermes",
        marks=("<tool_call>",),
        open=("<tool_call>", '\n{"name": "'),
        close=("}\n", "</tool_call>"),
        between="\n",
        trigger="<tool_call>",
    ),
    ToolFormat(name="llama3_json", marks=("<|python_tag|>",), middle='", "parameters": ', between="; "),
    ToolFormat(
        name="llama3_json", marks=('"parameters": ', "ipython"), middle='", "parameters": ', between="; "
    ),
    JSON,
)
CONTROL = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "<|python_tag|>")

PROMPT = """\
You can call functions. To call one, answer only with JSON:
{"name": its name, "arguments": {its parameters}}
Functions:
"""


def format_of(template: str) -> ToolFormat:
    return next(row for row in FORMATS if all(mark in template for mark in row.marks))


def shown_tokens(vocabulary: Vocabulary, texts: Sequence[str] = CONTROL) -> frozenset[int]:
    """Control tokens that must be seen as text, since they mark calls."""
    found = {token for text in texts if (token := vocabulary.find(text)) is not None}
    return frozenset(found & vocabulary.control)


# -- telling --------------------------------------------------------------------------------------


def told(messages: Sequence[Fields], tools: Sequence[Fields]) -> list[Fields]:
    """The messages for a template that knows neither functions nor calls."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    spelt = [_spelt(message, names) for message in messages]
    return with_system(spelt, introduction(tools)) if tools else spelt


def introduction(tools: Sequence[Fields]) -> str:
    lines = [
        dump({key: function[key] for key in ("name", "description", "parameters") if function.get(key)})
        for function in (tool["function"] for tool in tools)
    ]
    return PROMPT + "\n".join(lines)


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


def _spelt(message: Fields, names: Mapping[str, str]) -> Fields:
    if message["role"] in ("tool", "function"):
        name = message.get("name") or names.get(message.get("tool_call_id", ""), "the function")
        text = flatten(message.get("content"), "messages")
        return {"role": "user", "content": f"Result of {name}: {text}"}
    if not (calls := message.get("tool_calls")):
        return message
    lines = [text] if (text := flatten(message.get("content"), "messages")) else []
    lines += [f'{{"name": {dump(one["name"])}, "arguments": {one["arguments"]}}}' for one in functions(calls)]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(lines)}


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
        f"calls: {literals(*format.begin)} call {more} {literals(format.end)}",
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
