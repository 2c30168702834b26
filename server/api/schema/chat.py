"""/v1/chat/completions: the request."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.api.schema.base import Loose
from server.api.schema.sampling import MAX_INT64, Sampling
from server.errors import RequestError, UnsupportedParameter

MAX_MESSAGES = 4096
MEDIA_PARTS = ("image_url", "input_audio", "file", "video_url")
Name = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Loose):
    type: Literal["text"]
    text: str


class RefusalPart(Loose):
    type: Literal["refusal"]
    refusal: str


Part = TextPart | RefusalPart


def _text_or_parts(value: Any) -> Any:
    for part in value if isinstance(value, list) else ():
        match part:
            case {"type": "text", "text": str()} | {"type": "refusal", "refusal": str()}:
                pass
            case {"type": str(kind)} if kind in MEDIA_PARTS:
                raise UnsupportedParameter(
                    f"messages: content of type {kind}: not supported", param="messages"
                )
            case _:
                raise ValueError('each content part must be {"type": "text", "text": "..."}')
    if value is not None and not isinstance(value, str | list):
        raise ValueError("must be a text or a list of parts")
    return value


class FunctionCall(Loose):
    name: Name
    arguments: str


class ToolCall(Loose):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[Any] | None,
        BeforeValidator(_text_or_parts, json_schema_input_type=str | list[Part] | None),
    ] = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("content is required")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id is required in a message of role tool")
        return self

    @property
    def fields(self) -> dict[str, object]:
        """What a chat template may see: no field that nobody defines."""
        return self.model_dump(exclude_none=True, include=set(type(self).model_fields))


class Function(Loose):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    type: Literal["function"]
    function: Function


class NamedFunction(Loose):
    name: Name


class NamedTool(Loose):
    type: Literal["function"]
    function: NamedFunction


ToolWord = Literal["none", "auto", "required"]


def _named_tool(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise ValueError("must be none, auto, required or a named function")
    return value


class ChatRequest(Sampling):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "chat_template": (),
        "choice": (),
        "continue_final_message": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "lark": (),
        "modalities": (["text"],),
        "prediction": (),
        "prompt_logprobs": (),
        "reasoning_effort": (),
        "regex": (),
        "response_format": ({"type": "text"},),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(default_factory=list, max_length=128)]
    tool_choice: Annotated[
        str | NamedTool | None,
        BeforeValidator(_named_tool, json_schema_input_type=ToolWord | NamedTool | None),
    ] = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs: true")
        return self

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        choice = self.tool_choice or ("auto" if self.tools else "none")
        if not self.tools and choice not in ("none", "auto"):
            raise RequestError("tool_choice: needs tools", param="tool_choice")
        if self.tools and choice != "none":
            raise UnsupportedParameter("tools: only supported with tool_choice none", param="tools")

    @property
    def answer_limit(self) -> int | None:
        """`max_completion_tokens` is the newer name and wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
