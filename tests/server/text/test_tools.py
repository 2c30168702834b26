# ruff: noqa: RUF001 (DeepSeek's marks are what they are)
"""Functions: told, enforced, and read again, in every format."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from server.engine.constrain import Words
from server.engine.grammars import matcher_of, tokenizer_of
from server.text.calls import CallDelta, CallReader, ForcedCalls, FreeCalls
from server.text.formats import FORMATS, JSON, ToolFormat, format_of
from server.text.notations import typed
from server.text.tools import PROMPT, call_grammar, shown_tokens, told, with_calls_written, without_system
from server.text.vocabulary import Vocabulary

WEATHER = {"type": "object", "properties": {"city": {"enum": ["Paris", 'R"}ome']}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add"}},
]
FUNCTIONS: dict[str, Any] = {"get_weather": WEATHER, "add": {}}
BYTES = tuple(bytes([byte]) for byte in range(256))
MARKS = (b"[TOOL_CALLS]", b"[ARGS]", b"<tool_call>", b"</tool_call>", b"<|python_tag|>", b"<end>")
PLAIN = Vocabulary((*BYTES, b"<end>"), frozenset((256,)))
SPECIAL = Vocabulary((*BYTES, *MARKS), frozenset(range(256, 256 + len(MARKS))))

Made = list[tuple[str, dict[str, Any]]]

rows = pytest.mark.parametrize("row", FORMATS, ids=lambda row: f"{row.name}-{len(row.marks)}")
json_rows = pytest.mark.parametrize(
    "row", [row for row in FORMATS if row.forced is row], ids=lambda row: f"{row.name}-{len(row.marks)}"
)
tame = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=8)  # no mark
names = st.from_regex(r"[a-z]\w{0,5}", fullmatch=True)


def made_of(keys: st.SearchStrategy[str], texts: st.SearchStrategy[str]) -> st.SearchStrategy[Made]:
    values: st.SearchStrategy[Any] = st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=6,
    )
    called = st.tuples(st.sampled_from(["get_weather", "add"]), st.dictionaries(keys, values, max_size=3))
    return st.lists(called, min_size=1, max_size=3)


WILD, TAME = made_of(st.text(max_size=6), st.text(max_size=8)), made_of(names, tame)


def declared(made: Made) -> dict[str, Any]:
    """The functions of these calls, with parameters that are only texts declared so."""
    functions: dict[str, Any] = {"get_weather": {"properties": {}}, "add": {"properties": {}}}
    for name, arguments in made:
        for key, value in arguments.items():
            kinds = functions[name]["properties"].setdefault(key, {"type": []})["type"]
            kinds.append("string" if isinstance(value, str) else "other")
    for function in functions.values():
        for key, schema in function["properties"].items():
            function["properties"][key] = {"type": "string"} if set(schema["type"]) == {"string"} else {}
    return functions


def said_once(functions: dict[str, Any], name: str, arguments: dict[str, Any]) -> bool:
    """A text of JSON, for a parameter that may be anything, would be read as what it says."""
    return all(
        functions[name]["properties"][key] or not isinstance(value, str) or typed(value, {}) == value
        for key, value in arguments.items()
    )


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
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), cut=st.integers(1, 40))
def test_calls_are_read_as_they_were_made(row: ToolFormat, data: st.DataObject, cut: int) -> None:
    made = data.draw(WILD if row.forced is row else TAME)
    functions = declared(made)
    assume(all(said_once(functions, name, arguments) for name, arguments in made))
    text = row.write(made)
    free = FreeCalls(row, functions, new_id)
    for reader in (free, ForcedCalls(row, new_id)) if row.forced is row else (free,):
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


@json_rows
@pytest.mark.parametrize("vocabulary", [PLAIN, SPECIAL], ids=["text", "tokens"])
def test_the_grammar_takes_calls_and_nothing_else(row: ToolFormat, vocabulary: Vocabulary) -> None:
    grammar = call_grammar(row, TOOLS, vocabulary, many=True)
    one = [("get_weather", {"city": 'R"}ome'})]
    assert matches(grammar, vocabulary, row.write(one))
    assert matches(grammar, vocabulary, row.write([("add", {})]))
    assert matches(grammar, vocabulary, row.write(one * 8)) == row.many
    assert not matches(grammar, vocabulary, row.write(one * 9))
    assert not matches(grammar, vocabulary, row.write([("get_weather", {"city": "Rome"})]))
    assert not matches(grammar, vocabulary, row.write([("get_weather", {})]))
    assert not matches(grammar, vocabulary, row.write([("add", {"more": 1})]))
    assert not matches(grammar, vocabulary, row.write([("other", {})]))
    assert not matches(call_grammar(row, TOOLS, vocabulary, many=False), vocabulary, row.write(one * 2))


def test_or_an_answer_of_a_schema() -> None:
    grammar = call_grammar(JSON, TOOLS, PLAIN, many=True, instead='{"type": "integer"}')
    assert matches(grammar, PLAIN, "17")
    assert matches(grammar, PLAIN, JSON.write([("add", {})]))
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
    assert read(FreeCalls(row, FUNCTIONS, new_id), text, cut) == (text, [])


def test_an_answer_in_json_is_not_held_back() -> None:
    reader = FreeCalls(JSON, FUNCTIONS, new_id)
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
    shown, found = read(FreeCalls(JSON, FUNCTIONS, new_id), text, 5)
    assert (shown, found) == ("", [("get_weather", '{"city": "Paris"}')])


def test_text_around_calls_stays() -> None:
    text = 'I look.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\nDone.'
    hermes = format_of("<tool_call>")
    assert read(FreeCalls(hermes, FUNCTIONS, new_id), text, 3) == ("I look.\nDone.", [("add", "{}")])


def test_only_one_call_where_only_one_is_wanted() -> None:
    text = JSON.write([("add", {}), ("add", {})])
    assert len(read(FreeCalls(JSON, FUNCTIONS, new_id, many=False), text, 9)[1]) == 1


def test_arguments_of_a_forced_call_come_as_they_are_written() -> None:
    reader = ForcedCalls(JSON, new_id)
    assert reader.push('{"name": "add", "argum').calls == []
    assert reader.push('ents": {').calls == [CallDelta(0, "", "add", "x" * 24), CallDelta(0, "{")]
    assert reader.push('"a": "}').calls == [CallDelta(0, '"a": "}')]
    assert reader.unfinished
    assert reader.push('"}}').calls == [CallDelta(0, '"}')]
    assert not reader.unfinished


PARIS = [("get_weather", {"city": "Paris"})]
TWO = [*PARIS, ("add", {"a": 1, "b": [True, None, "x"]})]


@pytest.mark.parametrize(
    ("name", "text", "made"),
    [
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "</function>\n</tool_call>",
            PARIS,
        ),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            PARIS,
        ),
        (
            "deepseek_v31",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
            "<｜tool▁call▁end｜>"
            '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": [true, null, "x"]}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
            TWO,
        ),
        ("pythonic", "[get_weather(city='Paris'), add(a=1, b=[True, None, \"x\"])]", TWO),
        ("llama4_pythonic", "<|python_start|>[get_weather(city='Paris')]<|python_end|>", PARIS),
        ("lfm2", "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|>", PARIS),
        ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', PARIS),
        ("granite", '<|tool_call|> [{"arguments": {"city": "Paris"}, "name": "get_weather"}]', PARIS),
        (
            "gemma4",
            '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
            '<|tool_call>call:add{a:1,b:[true,null,<|"|>x<|"|>]}<tool_call|>',
            TWO,
        ),
        (
            "functiongemma",
            "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
            PARIS,
        ),
        (
            "glm",
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
            PARIS,
        ),
        ("mistral-args", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', PARIS),
        (
            "minimax",
            '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
            "</invoke>\n</minimax:tool_call>",
            PARIS,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_calls_as_models_write_them(name: str, text: str, made: Made, cut: int) -> None:
    row = next(row for row in FORMATS if row.name == name)
    shown, found = read(FreeCalls(row, FUNCTIONS, new_id), text, cut)
    assert shown.strip() == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == made
    if row.trigger:
        said = read(FreeCalls(row, FUNCTIONS, new_id), f"I look.\n{text}\nDone.", cut)
        assert (said[0].split(), said[1]) == (["I", "look.", "Done."], found)


@rows
def test_a_call_that_is_cut_is_none(row: ToolFormat) -> None:
    text = row.write([("get_weather", {"city": "Paris", "days": [1, 2]})])
    for size in range(len("".join(row.begin)), text.index("2") + 1):
        assert read(FreeCalls(row, FUNCTIONS, new_id), text[:size], 5) == (text[:size], [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\n<function=f>\n<parameter=p>", "qwen3_coder"),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("<|python_start|>", "llama4_pythonic"),
        ("respond with <|tool_call|> and a list", "granite"),
        ("{{ '<|tool_call>call:' + name }}", "gemma4"),
        ("{{ '<start_function_call>call:' + name }}", "functiongemma"),
        ("<tool_call>{name}\n<arg_key>", "glm"),
        ("<seed:tool_call>\n<function=f>\n<parameter=p>", "seed_oss"),
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


def test_calls_are_written_for_a_template_that_does_not_show_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = [{"role": "assistant", "content": "Well.", "tool_calls": [call]}]
    pythonic = next(row for row in FORMATS if row.name == "pythonic")
    assert with_calls_written(said, pythonic) == [{"role": "assistant", "content": "Well.[add(a=1)]"}]
    system, *rest = told(said, TOOLS, pythonic)
    assert "[function_name(parameter_name='value')]" in system["content"]
    assert rest == with_calls_written(said, pythonic)
    assert told(said, TOOLS, pythonic, shown=True)[1:] == said


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
