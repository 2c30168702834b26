"""What client libraries do with the server, each by a function whose docstring says what it did.

`python tests/clients/checks.py URL MODEL`, with the packages of tests/clients/requirements.txt:
`make test-clients` starts a server and runs it. Ends with 1 where a check fails.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CITIES = ["Paris", "Rome"]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}
KEY = "sk-none"

Check = Callable[[str, str], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


class Report(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=-50, le=60)


def schema() -> dict[str, Any]:
    return {
        "name": "report",
        "strict": True,
        "schema": {**Report.model_json_schema(), "additionalProperties": False},
    }


def check_stream(chunks: list[Any]) -> None:
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usages = [usage for chunk in chunks if (usage := getattr(chunk, "usage", None))]
    assert text
    assert usages[-1].completion_tokens == 8


def check_call(message: Any) -> None:
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in CITIES


@check
def openai(url: str, model: str) -> None:
    """chat, stream with usage, forced call, answer by schema"""
    from openai import OpenAI

    create = OpenAI(base_url=url, api_key=KEY, max_retries=0).chat.completions.create
    asked: dict[str, Any] = {"model": model, "messages": ASK}
    assert create(**asked, max_tokens=8).choices[0].message.content
    check_stream(list(create(**asked, max_tokens=8, stream=True, stream_options={"include_usage": True})))
    check_call(create(**asked, tools=[WEATHER], tool_choice=FORCED, max_tokens=64).choices[0].message)
    answer = create(
        **asked,
        response_format={"type": "json_schema", "json_schema": schema()},
        max_tokens=64,
        temperature=0,
    )
    Report.model_validate_json(answer.choices[0].message.content)


@check
def openai_responses(url: str, model: str) -> None:
    """response, conversation that goes on, typed events, forced call and its result, answer by schema"""
    from openai import OpenAI

    responses = OpenAI(base_url=url, api_key=KEY, max_retries=0).responses
    asked: dict[str, Any] = {"model": model, "input": ASK[0]["content"], "max_output_tokens": 8}
    first = responses.create(**asked, instructions="Be brief.")
    assert first.output_text
    assert first.usage.output_tokens == 8
    after = responses.create(**asked, previous_response_id=first.id)
    assert after.usage.input_tokens > first.usage.input_tokens
    assert responses.retrieve(after.id).output_text == after.output_text
    events = list(responses.create(**asked, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[0].type == "response.created"
    assert text == events[-1].response.output_text
    tool = {"type": "function", **WEATHER["function"]}
    calling = {**asked, "tools": [tool], "max_output_tokens": 64}
    with responses.stream(**calling, tool_choice="required") as stream:
        (call,) = stream.get_final_response().output
    assert json.loads(call.arguments)["city"] in CITIES
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns = [*ASK, call.model_dump(exclude={"parsed_arguments"}), result]
    assert responses.create(**{**calling, "input": turns}).usage.output_tokens
    parsed = responses.parse(**{**asked, "max_output_tokens": 64}, text_format=Report)
    assert isinstance(parsed.output_parsed, Report)


@check
def openai_embeddings(url: str, model: str) -> None:
    """one text and many, float and base64, fewer dimensions"""
    from openai import OpenAI

    create = OpenAI(base_url=url, api_key=KEY, max_retries=0).embeddings.create
    many = create(model=model, input=["Paris is in France", "Rome is in Italy"])
    (one,) = create(model=model, input="Paris is in France", encoding_format="float").data
    assert [item.index for item in many.data] == [0, 1]
    assert all(abs(a - b) < 1e-3 for a, b in zip(one.embedding, many.data[0].embedding, strict=True))
    assert abs(sum(number**2 for number in one.embedding) - 1) < 1e-3
    assert len(create(model=model, input="Paris", dimensions=8).data[0].embedding) == 8


@check
def anthropic(url: str, model: str) -> None:
    """message, events, forced call and its result, counted tokens, errors"""
    import anthropic as library

    messages = library.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0).messages
    asked: dict[str, Any] = {"model": model, "messages": ASK, "max_tokens": 8}
    answer = messages.create(**asked, system="Be brief.")
    assert answer.content[0].text
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 8)
    with messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        assert text == stream.get_final_text()
        assert stream.get_final_message().usage.output_tokens == 8
    function = WEATHER["function"]
    tools = [{"name": function["name"], "input_schema": function["parameters"]}]
    calling = {**asked, "tools": tools, "max_tokens": 64}
    with messages.stream(**calling, tool_choice={"type": "any"}) as stream:
        called = stream.get_final_message()
    (use,) = called.content
    assert (called.stop_reason, use.name) == ("tool_use", "get_weather")
    assert use.input["city"] in CITIES
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns = [*ASK, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert messages.create(**{**calling, "messages": turns}).role == "assistant"
    plain = messages.count_tokens(model=model, messages=ASK).input_tokens
    assert 0 < plain < messages.count_tokens(model=model, messages=ASK, tools=tools).input_tokens
    refused = ""
    try:
        messages.create(**{**asked, "model": "no-such-model"})
    except library.NotFoundError as error:
        refused = error.body["error"]["type"]
    assert refused == "not_found_error"


@check
def llama_index(url: str, model: str) -> None:
    """chat, stream, forced call, answer by schema"""
    from llama_index.core.llms import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def llm(max_tokens: int) -> Any:
        return OpenAILike(
            model=model,
            api_base=url,
            api_key=KEY,
            is_chat_model=True,
            is_function_calling_model=True,
            context_window=1024,
            max_tokens=max_tokens,
            max_retries=0,
        )

    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        return "sunny"

    turns = [ChatMessage(role="user", content=ASK[0]["content"])]
    assert llm(8).chat(turns).message.content
    assert "".join(part.delta or "" for part in llm(8).stream_chat(turns))
    assert llm(8).complete(ASK[0]["content"]).text
    tools = [FunctionTool.from_defaults(get_weather)]
    answer = llm(64).chat_with_tools(tools, chat_history=turns, tool_required=True)
    (call,) = llm(64).get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs["city"] in CITIES) == ("get_weather", True)
    found = llm(64).structured_predict(Report, PromptTemplate(ASK[0]["content"]))
    assert isinstance(found, Report)


@check
def litellm(url: str, model: str) -> None:
    """chat, stream with usage, forced call, answer by schema"""
    import litellm as library

    asked: dict[str, Any] = {"model": f"openai/{model}", "messages": ASK, "api_base": url, "api_key": KEY}
    assert library.completion(**asked, max_tokens=8).choices[0].message.content
    stream = library.completion(**asked, max_tokens=8, stream=True, stream_options={"include_usage": True})
    check_stream(list(stream))
    answer = library.completion(**asked, tools=[WEATHER], tool_choice=FORCED, max_tokens=64)
    check_call(answer.choices[0].message)
    answer = library.completion(
        **asked, response_format={"type": "json_schema", "json_schema": schema()}, max_tokens=64
    )
    Report.model_validate_json(answer.choices[0].message.content)


@check
def langchain(url: str, model: str) -> None:
    """chat, stream with usage, forced call, answer by schema"""
    from langchain_openai import ChatOpenAI

    def chat(max_tokens: int) -> Any:
        return ChatOpenAI(model=model, base_url=url, api_key=KEY, max_tokens=max_tokens, max_retries=0)

    text = ASK[0]["content"]
    assert chat(8).invoke(text).content
    chunks = list(chat(8).stream(text, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks)
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 8
    bound = chat(64).bind_tools([WEATHER], tool_choice="get_weather")
    (call,) = bound.invoke(text).tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in CITIES
    found = chat(64).with_structured_output(Report, method="json_schema").invoke(text)
    assert isinstance(found, Report)


@check
def instructor(url: str, model: str) -> None:
    """chat, stream with usage, forced call, answer by schema"""
    import instructor as library
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=KEY, max_retries=0)
    asked: dict[str, Any] = {"model": model, "messages": ASK, "max_tokens": 64, "max_retries": 0}
    plain = library.from_openai(client, mode=library.Mode.JSON_SCHEMA)
    text = plain.create(**{**asked, "max_tokens": 8}, response_model=None)
    assert text.choices[0].message.content
    stream = plain.create(
        **{**asked, "max_tokens": 8}, response_model=None, stream=True, stream_options={"include_usage": True}
    )
    check_stream(list(stream))
    assert isinstance(plain.create(**asked, response_model=Report), Report)
    by_call = library.from_openai(client, mode=library.Mode.TOOLS)
    assert isinstance(by_call.create(**asked, response_model=Report), Report)


def main(url: str, model: str) -> int:
    failed = 0
    for function in CHECKS:
        try:
            function(url, model)
            print(f"{function.__name__}: {function.__doc__}")
        except Exception:  # noqa: BLE001 - the others are still worth knowing
            failed += 1
            print(f"{function.__name__}: failed\n{traceback.format_exc()}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
