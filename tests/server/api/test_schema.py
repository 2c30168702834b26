"""What is taken, what is refused and in which words; no server is needed to decide that."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.body import parse
from server.api.ignored import header_value
from server.api.schema.admin import QuantizeRequest
from server.api.schema.base import Body
from server.api.schema.chat import ChatRequest
from server.api.schema.completions import CompletionRequest
from server.api.schema.tokens import TokenizeRequest
from server.errors import RequestError, UnsupportedParameter

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("temperature", -0.1, "0"),
        ("temperature", 2.1, "2"),
        ("temperature", "hot", "number"),
        ("temperature", True, "number"),
        ("top_p", 1.1, "1"),
        ("min_p", -1, "0"),
        ("top_k", -2, "-1"),
        ("n", 0, "1"),
        ("n", 17, "16"),
        ("n", 1e9, "integer"),
        ("n", "two", "integer"),
        ("max_tokens", 0, "1"),
        ("max_tokens", 1.5, "integer"),
        ("max_completion_tokens", -5, "1"),
        ("top_logprobs", 21, "20"),
        ("presence_penalty", 3, "2"),
        ("frequency_penalty", -3, "-2"),
        ("repetition_penalty", 1e-320, "0.01"),
        ("seed", 2**63, str(2**63 - 1)),
        ("seed", "x", "integer"),
        ("stop", ["a", "b", "c", "d", "e"], "4"),
        ("stop", 7, "list"),
        ("stop", [""], "1 character"),
        ("stream", "yes", "boolean"),
        ("logit_bias", [1], "dictionary"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "1024"),
        ("priority", 101, "100"),
        ("messages", [], "1 item"),
        ("messages", "hi", "list"),
        ("model", 5, "string"),
        ("tools", {"a": 1}, "list"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name_and_bound(field: str, value: object, bound: str) -> None:
    error = refused(**{field: value})
    assert (error.param or "").split("[")[0] == field
    assert str(error).startswith(f"{field}")
    assert bound in str(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "alien", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 500}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
    ],
)
def test_the_parameter_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"prediction": {}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
)
def test_what_cannot_be_honoured_yet_is_refused_not_ignored(fields: dict[str, Any]) -> None:
    error = refused(**fields)
    assert isinstance(error, UnsupportedParameter)
    assert error.param in {*fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": []},
        {"modalities": ["text"]},
        {"verbosity": "medium"},
        {"function_call": "none"},
    ],
)
def test_values_that_ask_for_nothing_pass_and_are_not_called_ignored(fields: dict[str, Any]) -> None:
    assert chat(**fields).ignored() == []


@pytest.mark.parametrize(
    "name", sorted({*ChatRequest.model_fields, *ChatRequest.UNSUPPORTED} - {"model", "messages"})
)
def test_null_is_the_default(name: str) -> None:
    assert chat(**{name: None}) == chat()


def test_unknown_and_bookkeeping_fields_are_taken_and_named_once() -> None:
    messages = [{**USER, "cache_control": 1}, {**USER, "cache_control": 2}]
    body = chat(messages=messages, x_vendor={"a": 1}, store=False, metadata={"k": "v"})
    assert sorted(body.ignored()) == ["messages.cache_control", "metadata", "store", "x_vendor"]


def test_unknown_fields_of_messages_do_not_reach_the_template() -> None:
    body = chat(messages=[{**USER, "name": "Ann", "secret": 1}])
    assert body.messages[0].fields == {"role": "user", "content": "hi", "name": "Ann"}


@given(st.lists(st.text(), max_size=40))
def test_ignored_names_are_a_safe_header(names: list[str]) -> None:
    value = header_value([name.encode("utf-8", "replace").decode() for name in names])
    assert value.isascii()
    assert not set(value) & set("\r\n\0")
    assert len(value) < 16_000


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_texts_or_token_lists(prompt: object, prompts: list[object]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], ["a", [1]], [-5], [True], 5, {"a": 1}, [[1], 2], ["a"] * 257, [2**31]]
)
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "x", "echo": True}, "echo"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_completions_that_make_no_sense_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[1,2]",
        b'"x"',
        b'{"model": ',
        b'{"model":"\xff\xfe","messages":[]}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"temperature": Infinity}',
        b'{"a":1}x',
        b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"n":' + b"9" * 100_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatRequest, raw)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *ChatRequest.UNSUPPORTED})
)


@settings(max_examples=200)
@given(
    st.sampled_from([ChatRequest, CompletionRequest, TokenizeRequest, QuantizeRequest]),
    st.dictionaries(FIELDS, JSON),
)
def test_any_json_is_taken_or_refused_in_words(model: type[Body], fields: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        parse(model, json.dumps({"model": "m", **fields}).encode("utf-8", "replace")).ignored()


MARKER = "Zx9Qw7"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": MARKER},
        {"messages": [{"role": MARKER, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": MARKER}]}]},
        {"tool_choice": MARKER},
        {"tools": [MARKER]},
        {"logit_bias": {MARKER: 1}},
        {"response_format": {"type": MARKER}},
        {"stop": [MARKER, 5]},
    ],
)
def test_an_error_never_repeats_what_was_sent(fields: dict[str, Any]) -> None:
    error = refused(**fields)
    assert MARKER not in f"{error}{error.param}"


def test_a_quantize_request_has_one_recipe() -> None:
    for fields in ({}, {"recipe": "q6_k", "preset": "q6_k"}):
        with pytest.raises(RequestError):
            parse(QuantizeRequest, json.dumps({"model": "m", **fields}).encode())
    with pytest.raises(UnsupportedParameter):
        parse(QuantizeRequest, b'{"model":"m","recipe":"q6_k","dry_run":true}')
