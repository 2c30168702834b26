"""/v1/responses: the request, as OpenAI defines it."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from server.api.schema.base import Loose, text_or
from server.api.schema.chat import MAX_MESSAGES, Effort, Name, without_tools
from server.api.schema.sampling import MAX_INT64, Sampling, StopTexts
from server.api.schema.structured import SchemaName
from server.errors import UnsupportedParameter

LOGPROBS = "message.output_text.logprobs"
MEDIA = ("input_image", "input_file", "input_audio")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, Field(min_length=1, max_length=256)]


class InputText(Loose):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Loose):
    type: Literal["refusal"]
    refusal: str


def _no_media(value: Any) -> Any:
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict) and part.get("type") in MEDIA:
            raise UnsupportedParameter(f"input: content of type {part['type']}: not supported", param="input")
    return value


Part = Annotated[InputText | Refusal, Discriminator("type")]
Content = Annotated[str | Annotated[list[Part], Field(max_length=MAX_MESSAGES)], BeforeValidator(_no_media)]


class MessageItem(Loose):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Loose):
    type: Literal["function_call"]
    call_id: Id
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None


class ResultItem(Loose):
    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: str | None = None
    status: Status | None = None


class Thought(Loose):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Loose):
    type: Literal["reasoning"]
    summary: list[Thought] | None = None
    content: list[Thought] | None = None
    id: str | None = None
    encrypted_content: None = None
    status: Status | None = None


def _typed(value: Any) -> Any:
    """Messages may leave their type out; null is what a field is without it.

    Items of tools that run at OpenAI's are refused by name.
    """
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "message")
    if isinstance(kind, str) and kind not in ITEMS:
        raise UnsupportedParameter(
            "input: only items of type " + ", ".join(ITEMS) + " are supported", param="input"
        )
    return {**{name: item for name, item in value.items() if item is not None}, "type": kind}


Item = Annotated[
    Annotated[MessageItem | CallItem | ResultItem | ReasoningItem, Discriminator("type")],
    BeforeValidator(_typed),
]


class FunctionTool(Loose):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, Field(description="calls that are forced are strict in any case")] = None


def _only_functions(value: Any) -> Any:
    for tool in value if isinstance(value, list) else ():
        if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
            raise UnsupportedParameter("tools: only tools of type function are supported", param="tools")
    return value


class NamedTool(Loose):
    type: Literal["function"]
    name: Name


class AllowedTools(Loose):
    """Of `tools`, those that may be called in this turn."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Discriminator("type")]


class TextFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Annotated[bool | None, Field(description="schemas are enforced in any case")] = None


class TextOptions(Loose):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def has_format(self) -> bool:
        return self.format is not None and self.format.type != "text"


class ReasoningOptions(Loose):
    effort: Effort | Literal["max"] | None = None
    summary: Annotated[Literal["auto"] | None, Field(description="thoughts come whole, never summarized")] = (
        None
    )


class StreamingOptions(Loose):
    include_obfuscation: Literal[False] | None = None


Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class ResponsesRequest(Sampling):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "n": (1,),
        "prompt": (),
        "prompt_logprobs": (),
        "truncation": ("disabled",),
    }

    input: Annotated[
        str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)], text_or("items")
    ]
    instructions: str | None = None
    previous_response_id: Id | None = None
    store: bool = True
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
    stop: StopTexts
    tools: Annotated[
        list[FunctionTool], BeforeValidator(_only_functions), Field(default_factory=list, max_length=128)
    ]
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[
        list[Annotated[str, Field(max_length=256)]], Field(default_factory=list, max_length=16)
    ]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[Metadata, Field(default_factory=dict, max_length=16)]
    stream_options: StreamingOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        return self

    def ignored(self) -> list[str]:
        """`include` adds fields of tools that run at OpenAI's, or encrypted thoughts: there are none. A call
        that is forced leaves nothing to say, and no form for it."""
        names = super().ignored()
        if any(name != LOGPROBS for name in self.include):
            names.append("include")
        if self._forces_call and self.text is not None and self.text.has_format:
            names.append("text.format")
        return [*names, *without_tools(self, self.tools)]

    @property
    def _forces_call(self) -> bool:
        match self.tool_choice:
            case "required" | NamedTool():
                return True
            case AllowedTools(mode=mode):
                return mode == "required"
        return False

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include or bool(self.top_logprobs)

    @property
    def usable(self) -> Iterable[FunctionTool]:
        """All `tools`, or those that `tool_choice` allows."""
        if not isinstance(self.tool_choice, AllowedTools):
            return self.tools
        allowed = {tool.name for tool in self.tool_choice.tools}
        return [tool for tool in self.tools if tool.name in allowed]
