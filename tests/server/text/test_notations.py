"""What a notation has written it reads again; what it cannot have written it refuses."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.text.calls import as_json
from server.text.notations import (
    FUNCTION_GEMMA,
    GEMMA_4,
    GLM,
    JSON_OBJECT,
    MINIMAX,
    PYTHON,
    QWEN_CODER,
    SEED,
    Keywords,
    Notation,
    Parameters,
    typed,
    unescaped,
)

NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.from_regex(r"[a-z]\w{0,5}", fullmatch=True)
TAME = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12)
ANY = st.text(st.characters(codec="utf-8"), max_size=12)
PRINTED = ("True", "False", "None")  # a template may print these, and nothing else would be meant by them


def objects(keys: st.SearchStrategy[str], texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    values: st.SearchStrategy[Any] = st.recursive(
        st.none() | st.booleans() | NUMBERS | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(keys, values, max_size=4)


def schema_of(arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return {"properties": {key: {"type": kinds.get(type(item), "null")} for key, item in arguments.items()}}


# Python's own strings may hold anything; the others cannot say their own marks.
CASES: list[tuple[Notation, str, st.SearchStrategy[dict[str, Any]]]] = [
    (JSON_OBJECT, "", objects(ANY, ANY)),
    (PYTHON, ")", objects(KEYS, ANY)),
    (GEMMA_4, "}", objects(KEYS, TAME)),
    (FUNCTION_GEMMA, "}", objects(KEYS, TAME)),
    (QWEN_CODER, "</function>", objects(KEYS, TAME)),
    (SEED, "</function>", objects(KEYS, TAME)),
    (GLM, "</tool_call>", objects(KEYS, TAME)),
    (MINIMAX, "</invoke>", objects(KEYS, TAME)),
]


@pytest.mark.parametrize(("notation", "close", "made"), CASES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_written_is_read(
    notation: Notation, close: str, made: st.SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    arguments = data.draw(made)
    before = data.draw(st.sampled_from(["", "text before it "]))
    text = before + notation.write(arguments)
    found = notation.read(text + close, len(before), schema_of(arguments))
    assert found is not None
    assert found[0] == arguments
    assert [type(value) for value in found[0].values()] == [type(value) for value in arguments.values()]
    assert (text + close)[found[1] :].strip() == close


@pytest.mark.parametrize(
    "text",
    [
        "a=", "a=b)", "a=1 b=2)", "a='x)", 'a="x\\")', "a=[1,)", "a={'k' 1})", "a=1e999)", "=1)", "a=--1)",
        "a=" + "[" * 500 + "]" * 500 + ")", "a=__import__('os'))", "a=f(1))", "a=1+1)", "a={k: 1})",
        "a=" + "9" * 5000 + ")",
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(text: str) -> None:
    read = PYTHON.read(text, 0, {})
    assert read is None or text[read[1] : read[1] + 1] != ")"


@settings(deadline=None)
@given(st.text(alphabet="{}[]()'\"\\:=,<|>abc1e-. \n", max_size=60))
def test_whatever_a_model_writes_is_answered(text: str) -> None:
    for notation, _, _ in CASES:
        read = notation.read(text, 0, {})
        assert read is None or (isinstance(read[0], dict) and 0 <= read[1] <= len(text))


def test_schemas_decide_what_a_text_is() -> None:
    assert typed("3", {"type": "string"}) == "3"
    assert typed("3", {"enum": ["3", "4"]}) == "3"
    assert typed("3", {"type": "integer"}) == 3
    assert typed("3", {"type": ["string", "integer"]}) == 3
    assert typed("3", None) == 3
    assert typed("three", {"type": "integer"}) == "three"
    assert typed("NaN", {}) == "NaN"
    assert [typed(word, {}) for word in PRINTED] == [True, False, None]
    assert typed("{'a': [True, None]}", {"type": "object"}) == {"a": [True, None]}


def test_long_texts_stay_as_they_are() -> None:
    code = 'def f(a):\n    return a < 3 or "</div>"\n'
    text = f"<parameter=code>\n{code}\n</parameter>\n</function>"
    assert QWEN_CODER.read(text, 0, {}) == ({"code": code}, text.index("\n</function>"))


def test_python_escapes_and_pairs_of_surrogates() -> None:
    assert unescaped(r"a\n\t\\\'\x41\u00e9\U0001F600\d") == "a\n\t\\'A\u00e9\U0001f600\\d"
    assert unescaped(r"\ud83d\ude00") == "\U0001f600"
    half = as_json({"a": unescaped(r"\ud83d")})
    assert half == '{"a": "\\ud83d"}'
    assert as_json({"a": float("inf")}) is None
    assert json.loads(half) == {"a": "\ud83d"}


def test_notations_are_rows() -> None:
    assert {type(notation) for notation, _, _ in CASES} >= {Keywords, Parameters}
