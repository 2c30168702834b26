"""Functions: told, enforced, and read again, in every format."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from server.engine.constrain import Words
from server.engine.grammars import matcher_of, tokenizer_of
from server.text.calls import CallDelta, CallReader, ForcedCalls, FreeCalls
from server.text.tools import (
    FORMATS,
    JSON,
    PROMPT,
    ToolFormat,
    call_grammar,
    format_of,
    shown_tokens,
    told,
    without_system,
)
from server.text.vocabulary import Vocabulary

NAMES = ("get_weather", "add")
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Paris", 'R"}ome']}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add"}},
]
BYTES = tuple(bytes([byte]) for byte in range(256))
MARKS = (b"[TOOL_CALLS]", b"[ARGS]", b"<tool_call>", b"</tool_call>", b"<|python_tag|>", b"<end>")
PLAIN = Vocabulary((*BYTES, b"<end>"), frozenset((256,)))
SPECIAL = Vocabulary((*BYTES, *MARKS), frozenset(range(256, 256 + len(MARKS))))

Made = list[tuple[str, dict[str, Any]]]

rows = pytest.mark.parametrize("row", FORMATS, ids=lambda row: f"{row.name}-{len(row.marks)}")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), values, max_size=3)),
    min_size=1,
    max_size=3,
)


def spell(row: ToolFormat, made: Made) -> str:
    spelt = [
        "".join(row.open) + name + row.middle + json.dumps(arguments, ensure_ascii=False) + "".join(row.close)
        for name, arguments in made
    ]
    return "".join(row.begin) + row.between.join(spelt) + row.end


def new_id(chars: int) -> str:
    return "x" * chars


def read(reader: CallReader, text: str, cut: int) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, put together from pieces of `cut` characters."""
    shown = ""
    names: list[str] = []
    arguments: list[str] = []
    found = [reader.push(text[i : i + cut]) for i in range(0, len(text), cut)]
    for part in (*found, reader.flush()):
        shown += part.text
        for delta in part.calls:
            if delta.name is not None:
                assert delta.index == len(names)
                assert delta.id
                names.append(delta.name)
                arguments.append("")
            arguments[delta.index] += delta.arguments
    return shown, list(zip(names, arguments, strict=True))


@rows
@settings(max_examples=40)
@given(made=calls, cut=st.integers(1, 40))
def test_calls_are_read_as_they_were_made(row: ToolFormat, made: Made, cut: int) -> None:
    text = spell(row, made)
    for reader in (ForcedCalls(row, new_id), FreeCalls(row, NAMES, new_id)):
        shown, found = read(reader, text, cut)
        assert shown.strip() == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == made


def matches(grammar: str, vocabulary: Vocabulary, text: str) -> bool:
    words = Words(vocabulary.pieces, vocabulary.control, frozenset((len(vocabulary.pieces) - 1,)))
    matcher = matcher_of(LLMatcher.grammar_from_lark(grammar), tokenizer_of(words))
    assert not matcher.is_error(), matcher.get_error()
    tokens: list[int] = []
    while text:
        mark = next((i for i in vocabulary.control if text.startswith(vocabulary.pieces[i].decode())), None)
        size = 1 if mark is None else len(vocabulary.pieces[mark])
        tokens += list(text[0].encode()) if mark is None else [mark]
        text = text[size:]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@rows
@pytest.mark.parametrize("vocabulary", [PLAIN, SPECIAL], ids=["text", "tokens"])
def test_the_grammar_takes_calls_and_nothing_else(row: ToolFormat, vocabulary: Vocabulary) -> None:
    grammar = call_grammar(row, TOOLS, vocabulary, many=True)
    one = [("get_weather", {"city": 'R"}ome'})]
    assert matches(grammar, vocabulary, spell(row, one))
    assert matches(grammar, vocabulary, spell(row, [("add", {})]))
    assert matches(grammar, vocabulary, spell(row, one * 8)) == row.many
    assert not matches(grammar, vocabulary, spell(row, one * 9))
    assert not matches(grammar, vocabulary, spell(row, [("get_weather", {"city": "Rome"})]))
    assert not matches(grammar, vocabulary, spell(row, [("get_weather", {})]))
    assert not matches(grammar, vocabulary, spell(row, [("add", {"more": 1})]))
    assert not matches(grammar, vocabulary, spell(row, [("other", {})]))
    assert not matches(call_grammar(row, TOOLS, vocabulary, many=False), vocabulary, spell(row, one * 2))


def test_or_an_answer_of_a_schema() -> None:
    grammar = call_grammar(JSON, TOOLS, PLAIN, many=True, instead='{"type": "integer"}')
    assert matches(grammar, PLAIN, "17")
    assert matches(grammar, PLAIN, spell(JSON, [("add", {})]))
    assert not matches(grammar, PLAIN, "no")


@rows
@pytest.mark.parametrize(
    "text",
    [
        "No function is needed.",
        '{"answer": 5, "name": "add"}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": "add", "arguments": {broken',
        '{"name": "add", "arguments": [1]}',
        '[{"name": 7}]',
        "<tool_call>\n{}\n</tool_call>",
        "[TOOL_CALLS]nothing of the kind",
        "[TOOL_CALLS]add[ARGS]{",
        "{{{" * 2000,
        "",
    ],
)
@pytest.mark.parametrize("cut", [1, 1000])
def test_what_is_no_call_stays_text(row: ToolFormat, text: str, cut: int) -> None:
    assert read(FreeCalls(row, NAMES, new_id), text, cut) == (text, [])


def test_an_answer_in_json_is_not_held_back() -> None:
    reader = FreeCalls(JSON, NAMES, new_id)
    assert reader.push('{"answer":').text == '{"answer":'


@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {"city": "Paris"}, "name": "get_weather"}',
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "Paris"}}}',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    ],
)
def test_free_models_spell_calls_in_many_ways(text: str) -> None:
    shown, found = read(FreeCalls(JSON, NAMES, new_id), text, 5)
    assert (shown, found) == ("", [("get_weather", '{"city": "Paris"}')])


def test_text_around_calls_stays() -> None:
    text = 'I look.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\nDone.'
    hermes = format_of("<tool_call>")
    assert read(FreeCalls(hermes, NAMES, new_id), text, 3) == ("I look.\nDone.", [("add", "{}")])


def test_only_one_call_where_only_one_is_wanted() -> None:
    text = spell(JSON, [("add", {}), ("add", {})])
    assert len(read(FreeCalls(JSON, NAMES, new_id, many=False), text, 9)[1]) == 1


def test_arguments_of_a_forced_call_come_as_they_are_written() -> None:
    reader = ForcedCalls(JSON, new_id)
    assert reader.push('{"name": "add", "argum').calls == []
    assert reader.push('ents": {').calls == [CallDelta(0, "", "add", "x" * 24), CallDelta(0, "{")]
    assert reader.push('"a": "}').calls == [CallDelta(0, '"a": "}')]
    assert reader.push('"}}').calls == [CallDelta(0, '"}')]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("[TOOL_CALLS] {{ x }}", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral-args"),
        ("<|python_tag|>", "llama3_json"),
        ("<|im_start|>", "json"),
    ],
)
def test_the_format_is_found_in_the_template(template: str, name: str) -> None:
    assert format_of(template).name == name


def test_control_tokens_that_mark_calls_are_shown() -> None:
    assert shown_tokens(PLAIN) == frozenset()
    assert shown_tokens(SPECIAL) == frozenset(range(256, 261))


def test_a_template_without_functions_is_told_in_words() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
    ]
    system, user, assistant, result = told(history, TOOLS)
    assert system["content"].startswith("Be kind.\n\n" + PROMPT)
    assert '{"name":"add"}' in system["content"]
    assert user == history[1]
    assert assistant["content"] == '{"name": "add", "arguments": {"a": 1}}'
    assert "tool_calls" not in assistant
    assert result == {"role": "user", "content": "Result of add: 2"}
    assert told(history[:2], []) == history[:2]
    assert without_system([system, user]) == [{"role": "user", "content": f"{system['content']}\n\nAdd."}]
