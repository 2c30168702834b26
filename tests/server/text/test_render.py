"""Our rendering equals transformers', for the bundled model and eleven templates in well-known styles."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from server.errors import RequestError
from server.text.template import ChatTemplate

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
REPO = Path(__file__).parents[3]
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tell the <weather> & "more" of a café',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    }
]
ARGUMENTS = {"city": "Zürich <old>", "days": [1, 2]}

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "What's the <weather>?\n"}
ANSWER = {"role": "assistant", "content": "  Fine & dry. "}
AGAIN = {"role": "user", "content": "Danke für alles 🙂 USER: <think>"}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": '{"sun": true}'}


def asking(arguments: object, content: str | None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    path = REPO / "models" / "tiny-chat" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)


def theirs(
    reference: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]], **options: Any
) -> str:
    options.setdefault("add_generation_prompt", True)
    text: str = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    return text


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(request.param.read_text("utf-8"), SPECIAL)


CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "three": [USER, ANSWER, AGAIN],
    "five": [SYSTEM, USER, ANSWER, AGAIN, ANSWER],
    "two users": [USER, USER],
    "thinking": [USER, {**ANSWER, "content": "<think>\nhm\n</think>\n\nSo."}],
    "reasoned": [USER, {**ANSWER, "reasoning": "hm"}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_conversations(
    reference: PreTrainedTokenizerFast, template: ChatTemplate, name: str, prompt: bool
) -> None:
    messages: list[dict[str, Any]] = CONVERSATIONS[name]
    given = messages
    if template.traits.parts:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        expected = theirs(reference, template.source, given, add_generation_prompt=prompt)
    except TemplateError as error:
        refusal = str(error)
    else:
        assert template.render(messages, add_generation_prompt=prompt) == expected
        return
    with pytest.raises(RequestError) as caught:
        template.render(messages, add_generation_prompt=prompt)
    assert refusal in str(caught.value)


@pytest.mark.parametrize("name", ["llama3", "mistral", "hermes", "qwen3", "deepseek"])
def test_tools(reference: PreTrainedTokenizerFast, name: str) -> None:
    """Clients send arguments as JSON text; templates get what they print rightly."""
    source = next(path for path in TEMPLATES if path.stem == name).read_text("utf-8")
    template = ChatTemplate(source, SPECIAL)
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    sent = [USER, asking(text, None), RESULT]
    expected = [USER, asking(text if name == "deepseek" else ARGUMENTS, ""), RESULT]
    assert template.render(sent, tools=TOOLS) == theirs(reference, source, expected, tools=TOOLS)
    assert "Zürich <old>" in template.render(sent, tools=TOOLS)
    assert template.traits.tools == (name != "deepseek")


@pytest.mark.parametrize("content", ["Once upon", "Once upon ", "Once upon\n"])
def test_a_final_message_is_continued(
    reference: PreTrainedTokenizerFast, template: ChatTemplate, content: str
) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    given: list[dict[str, Any]] = messages
    if template.traits.parts:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs(reference, template.source, given, **options)
    assert template.render(messages, continue_final_message=True) == expected


def test_the_bundled_model(reference: PreTrainedTokenizerFast) -> None:
    config = json.loads((REPO / "models" / "tiny-chat" / "tokenizer_config.json").read_text("utf-8"))
    source = config["chat_template"]
    template = ChatTemplate(source, SPECIAL)
    for messages in CONVERSATIONS.values():
        assert template.render(messages) == theirs(reference, source, messages)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_any_text(reference: PreTrainedTokenizerFast, template: ChatTemplate, contents: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    given: list[dict[str, Any]] = messages
    if template.traits.parts:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert template.render(messages) == theirs(reference, template.source, given)


def test_the_variables_of_a_request(reference: PreTrainedTokenizerFast) -> None:
    source = next(path for path in TEMPLATES if path.stem == "qwen3").read_text("utf-8")
    ours = ChatTemplate(source, SPECIAL).render([USER], extra={"enable_thinking": False})
    assert ours == theirs(reference, source, [USER], enable_thinking=False)
    assert ours.endswith("<think>\n\n</think>\n\n")


# One template a line; the last shows what becomes of spaces and newlines around tags.
FRAGMENTS = (Path(__file__).parent / "fragments.txt").read_text("utf-8").splitlines()
FRAGMENTS.append("   {%- if true %}   \n  kept   \n   {% endif %}\n\nlast line\n")


@pytest.mark.parametrize("source", FRAGMENTS)
def test_what_jinja_offers_means_the_same(reference: PreTrainedTokenizerFast, source: str) -> None:
    messages = [USER, ANSWER]
    assert ChatTemplate(source, SPECIAL).render(messages) == theirs(reference, source, messages)
