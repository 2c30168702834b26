"""/v1/chat/completions: the request."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, model_validator

from server.api.schema.base import Loose
from server.api.schema.sampling import MAX_INT64, MAX_TOP
from server.api.schema.structured import Structured
from server.errors import RequestError, UnsupportedParameter
from server.text.schemas import check_schema, check_size, dump

MAX_MESSAGES = 4096
MAX_TOOLS_BYTES = 256 << 10
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
MEDIA_PARTS = ("image_url", "input_audio", "file", "video_url")
Name = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Loose):
    type: Literal["text"]
    text: str


class RefusalPart(Loose):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Discriminator("type")]


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
    content: Annotated[str | list[Part] | None, BeforeValidator(_text_or_parts)] = None
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
        """What a chat template may see: no field that nobody defines. A refusal is what was said instead."""
        fields = self.model_dump(exclude_none=True, include=set(type(self).model_fields))
        if "content" not in fields and "refusal" in fields:
            fields["content"] = fields.pop("refusal")
        return fields


class Function(Loose):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, Field(description="calls that are forced are strict in any case")] = None

    @property
    def shown(self) -> dict[str, Any]:
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {name: value for name, value in fields.items() if value is not None}


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


def without_tools(body: Loose, tools: Sequence[Loose]) -> list[str]:
    """What a request says of calls that no function is there for."""
    given = body.model_fields_set
    return [] if tools else [name for name in ("tool_choice", "parallel_tool_calls") if name in given]


class ChatRequest(Structured):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "chat_template": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[Tool], Field(default_factory=list, max_length=128)]
    tool_choice: Annotated[
        str | NamedTool | None,
        BeforeValidator(_named_tool, json_schema_input_type=ToolWord | NamedTool | None),
    ] = None
    parallel_tool_calls: bool = True
    continue_final_message: Annotated[
        bool, Field(description="the answer goes on where the last message ends")
    ] = False
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(default_factory=dict, max_length=64)]
    reasoning_effort: Effort | None = None
    reasoning_budget: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_INT64,
            validation_alias=AliasChoices("reasoning_budget", "thinking_token_budget", "thinking_budget"),
            description="tokens of thought after which the closing mark is forced",
        ),
    ] = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs: true")
        return self

    @model_validator(mode="after")
    def _begins_somewhere(self) -> "ChatRequest":
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise ValueError("add_generation_prompt: must be false with continue_final_message: true")
        if not self.messages[-1].content:
            raise ValueError("continue_final_message: the last message must have a text to go on with")
        return self

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: needs tools", param="tool_choice")
        self._check_tools()

    def _check_tools(self) -> None:
        """Raises RequestError."""
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise RequestError("tools: each function needs a name of its own", param="tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise RequestError("tool_choice: there is no such function in tools", param="tool_choice")
        try:
            check_size(dump(self.offered), "tools", MAX_TOOLS_BYTES)
        except RecursionError:
            raise RequestError("tools: are nested too deeply", param="tools") from None
        for tool in self.tools:
            if tool.function.parameters is not None:
                check_schema(tool.function.parameters, "tools")
                if tool.function.parameters.get("type", "object") != "object":
                    raise RequestError("tools: parameters must be of type object", param="tools")

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Functions that the model is told of: none where it may call none, one where it must call that."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if self.tool_choice == "none":
            return []
        return [
            {"type": "function", "function": tool.function.shown}
            for tool in self.tools
            if named in (None, tool.function.name)
        ]

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def ignored(self) -> list[str]:
        """A call that is forced leaves nothing to say, and no form for it."""
        vain = self.forces_call and self.has_format
        return [*super().ignored(), *(["response_format"] if vain else []), *without_tools(self, self.tools)]

    @property
    def many_calls(self) -> bool:
        return self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)

    @property
    def answer_limit(self) -> int | None:
        """`max_completion_tokens` is the newer name and wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
