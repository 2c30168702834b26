"""What clients send, as templates get it."""

from typing import Any

import pytest

from server.errors import RequestError
from server.text.messages import Traits, prepare
from server.text.template import ChatTemplate

SHOW = ChatTemplate("{{ messages | tojson }}")


def test_parts_become_paragraphs() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prepare([{"role": "user", "content": parts}], Traits())[0]["content"] == "a\nb"


def test_no_content_is_empty_content_and_other_nulls_are_absent() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None, "name": "x"}
    assert prepare([message], Traits()) == [{"role": "assistant", "content": "", "name": "x"}]


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert prepare([message], Traits())[0]["role"] == "system"
    assert prepare([message], Traits(developer=True))[0]["role"] == "developer"
    assert ChatTemplate("{% if messages[0].role == 'developer' %}{% endif %}").traits.developer


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ({"a": 1}, {"a": 1}),
        ("{broken", "{broken"),
        ("[1]", "[1]"),
        ("[" * 9999, "[" * 9999),
    ],
)
def test_arguments_become_objects(sent: object, expected: object) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": sent}}]}
    [prepared] = prepare([message], Traits())
    assert prepared["tool_calls"][0]["function"]["arguments"] == expected


def test_arguments_stay_text_where_the_template_adds_them_to_text() -> None:
    call = "{% for c in m.tool_calls %}{{ 'call ' + c.function.arguments }}{% endfor %}"
    template = ChatTemplate("{% for m in messages %}" + call + "{% endfor %}")
    assert template.traits.text_arguments
    for sent in ('{"a": 1}', {"a": 1}):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": sent}}]}
        assert template.render([message]) == 'call {"a": 1}'


def test_a_template_that_ignores_tools_shows_only_messages() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert not template.traits.tools
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "12"}]},
    ]
    assert (
        template.render(messages, tools=[{"type": "function", "function": {"name": "f"}}])
        == "assistant: \ntool: 12\n"
    )


def test_a_template_that_wants_parts_gets_them() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    assert template.traits.parts
    assert template.render([{"role": "user", "content": "hello"}]) == "hello"


def test_the_client_s_messages_are_not_changed() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": "so", "tool_calls": [call]}]
    template = ChatTemplate("{{ messages[-1].content }}")
    assert template.render(messages, continue_final_message=True) == "so"
    assert messages == [
        {
            "role": "assistant",
            "content": "so",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        }
    ]


def nested(depth: int) -> object:
    return {"a": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": 3, "content": "x"}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "tool_calls": 3}], "messages[1].tool_calls"),
        ([{"role": "user", "content": "", "x": nested(100)}], "messages[0]"),
        ([{"role": "user", "content": "", "x": object()}], "messages[0]"),
    ],
)
def test_a_wrong_message_is_named(messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        SHOW.render(messages)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_variables_of_a_request_do_not_replace_ours() -> None:
    with pytest.raises(RequestError, match="tools cannot be set") as caught:
        SHOW.render([{"role": "user", "content": "x"}], extra={"tools": []})
    assert caught.value.param == "chat_template_kwargs.tools"


def test_a_message_that_the_template_hides_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("nothing").render([{"role": "assistant", "content": "x"}], continue_final_message=True)
