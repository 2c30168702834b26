"""What client libraries do with the server: a chat, a stream with usage, a forced call, an answer by schema.

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
def litellm(url: str, model: str) -> None:
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
            print(f"{function.__name__}: chat, stream with usage, forced call, answer by schema")
        except Exception:  # noqa: BLE001 - the others are still worth knowing
            failed += 1
            print(f"{function.__name__}: failed\n{traceback.format_exc()}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
