# ruff: noqa: RUF001 (DeepSeek's marks are what they are)
"""The ways in which models write calls of functions, as rows. A model's own is found in its chat template.

A row of another package's model is one more entry of FORMATS; how its arguments are written is a Notation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from server.text.notations import (
    FUNCTION_GEMMA,
    GEMMA_4,
    GLM,
    JSON_OBJECT,
    MINIMAX,
    PYTHON,
    QWEN_CODER,
    SEED,
    Notation,
    loose,
)

NAME = r"([\w.:/-]{1,128})"
Call = tuple[str, dict[str, Any]]  # name and arguments


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
    end: tuple[str, ...] = ()
    trigger: str = ""  # what tells a call from text; without one, a call stands at the start of an answer
    many: bool = True  # an answer that is forced to call may call several times
    bare: bool = False  # the name stands outside of the JSON
    aside: str = ""  # an expression for what may stand between name and `middle`
    arguments: Notation = JSON_OBJECT
    id_chars: int = 24  # of a call's id

    def write(self, calls: Sequence[Call]) -> str:
        written = (
            "".join(self.open) + name + self.middle + self.arguments.write(arguments) + "".join(self.close)
            for name, arguments in calls
        )
        return "".join(self.begin) + self.between.join(written) + "".join(self.end)

    @property
    def forced(self) -> "ToolFormat":
        """The format of calls that a grammar enforces: schemas are enforced in JSON."""
        return self if self.arguments is JSON_OBJECT else JSON

    @cached_property
    def head(self) -> "re.Pattern[str]":
        """Of a bare call, up to its arguments."""
        return re.compile(
            loose("".join(self.open)) + r"\s*" + NAME + self.aside + r"\s*" + loose(self.middle)
        )

    @cached_property
    def tail(self) -> "re.Pattern[str]":
        return re.compile(r"\s*" + loose("".join(self.close).strip()))

    @cached_property
    def around(self) -> "re.Pattern[str]":
        """What stands before, between and after bare calls."""
        parts = (*self.begin, *self.close, *self.end, self.between)
        marks = "".join(loose(part.strip()) + "|" for part in parts if part.strip())
        return re.compile(rf"(?:{marks}[\s,;])*")


JSON = ToolFormat(name="json", marks=(), between="\n", many=False)
PYTHONIC = ToolFormat(
    name="pythonic",  # Llama 3.2, where its template asks for it
    marks=("func_name1(params_name1",),
    begin=("[",),
    open=("",),
    middle="(",
    close=(")",),
    between=", ",
    end=("]",),
    bare=True,
    arguments=PYTHON,
)
LFM2 = replace(
    PYTHONIC,
    name="lfm2",
    marks=("<|tool_list_start|>",),
    begin=("<|tool_call_start|>", "["),
    end=("]", "<|tool_call_end|>"),
    trigger="<|tool_call_start|>",
)
QWEN = ToolFormat(
    name="qwen3_coder",
    marks=("<function=", "<parameter=", "<tool_call>"),
    open=("<tool_call>", "\n<function="),
    middle=">\n",
    close=("</function>\n", "</tool_call>"),
    between="\n",
    trigger="<tool_call>",
    bare=True,
    arguments=QWEN_CODER,
)
FORMATS = (
    ToolFormat(
        name="mistral-args",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        open=("[TOOL_CALLS]", ""),
        middle="[ARGS]",
        aside=r"(?:\s*\[CALL_ID\]\s*\w*)?",
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
        end=("]",),
        trigger="[TOOL_CALLS]",
        id_chars=9,
    ),
    QWEN,
    replace(
        QWEN,
        name="seed_oss",
        marks=("<seed:tool_call>",),
        open=("<seed:tool_call>", "\n<function="),
        close=("</function>\n", "</seed:tool_call>"),
        trigger="<seed:tool_call>",
        arguments=SEED,
    ),
    ToolFormat(
        name="glm",
        marks=("<arg_key>", "<tool_call>"),
        open=("<tool_call>", ""),
        middle="\n",
        close=("</tool_call>",),
        between="\n",
        trigger="<tool_call>",
        bare=True,
        arguments=GLM,
    ),
    ToolFormat(
        name="minimax",
        marks=("<invoke name=", "<parameter name=", "<minimax:tool_call>"),
        begin=("<minimax:tool_call>", "\n"),
        open=('<invoke name="',),
        middle='">\n',
        close=("</invoke>\n",),
        end=("</minimax:tool_call>",),
        trigger="<minimax:tool_call>",
        bare=True,
        arguments=MINIMAX,
    ),
    ToolFormat(
        name="deepseek_v3",  # and R1
        marks=("<｜tool▁calls▁begin｜>", "```json"),
        begin=("<｜tool▁calls▁begin｜>",),
        open=("<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", ""),
        middle="\n```json\n",
        close=("\n```", "<｜tool▁call▁end｜>"),
        between="\n",
        end=("<｜tool▁calls▁end｜>",),
        trigger="<｜tool▁calls▁begin｜>",
        bare=True,
    ),
    ToolFormat(
        name="deepseek_v31",
        marks=("<｜tool▁calls▁begin｜>",),
        begin=("<｜tool▁calls▁begin｜>",),
        open=("<｜tool▁call▁begin｜>", ""),
        middle="<｜tool▁sep｜>",
        close=("<｜tool▁call▁end｜>",),
        end=("<｜tool▁calls▁end｜>",),
        trigger="<｜tool▁calls▁begin｜>",
        bare=True,
    ),
    ToolFormat(
        name="granite",  # 3; 4 writes hermes
        marks=("<|tool_call|>",),
        begin=("<|tool_call|>", "["),
        between=", ",
        end=("]",),
        trigger="<|tool_call|>",
    ),
    ToolFormat(
        name="gemma4",
        marks=("<|tool_call>call:",),
        open=("<|tool_call>", "call:"),
        middle="{",
        close=("}", "<tool_call|>"),
        trigger="<|tool_call>",
        bare=True,
        arguments=GEMMA_4,
    ),
    ToolFormat(
        name="functiongemma",
        marks=("<start_function_call>call:",),
        open=("<start_function_call>", "call:"),
        middle="{",
        close=("}", "<end_function_call>"),
        trigger="<start_function_call>",
        bare=True,
        arguments=FUNCTION_GEMMA,
    ),
    LFM2,
    replace(LFM2, marks=("<|tool_call_start|>",)),
    PYTHONIC,
    replace(
        PYTHONIC,
        name="llama4_pythonic",
        marks=("<|python_start|>",),
        begin=("<|python_start|>", "["),
        end=("]", "<|python_end|>"),
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
# Texts that are control tokens of some models, and mark calls there.
CONTROL = (
    "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<tool_call>", "</tool_call>", "<|python_tag|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_call|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<minimax:tool_call>", "</minimax:tool_call>",
    "<seed:tool_call>", "</seed:tool_call>",
    "<start_function_call>", "<end_function_call>", "<escape>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|python_start|>", "<|python_end|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip


def format_of(template: str) -> ToolFormat:
    return next(row for row in FORMATS if all(mark in template for mark in row.marks))
