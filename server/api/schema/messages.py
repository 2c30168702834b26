"""/v1/messages and /v1/messages/count_tokens: the requests, as Anthropic defines them."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field

from server.api.schema.base import Loose, text_or
from server.api.schema.chat import MAX_MESSAGES, Name, without_tools
from server.api.schema.sampling import MAX_INT64, Sampling, StopText
from server.errors import UnsupportedParameter

MAX_BLOCKS = 4096
BLOCKS = ("text", "thinking", "tool_use", "tool_result")


class TextBlock(Loose):
    type: Literal["text"]
    text: str


class ThinkingBlock(Loose):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, Field(description="empty: thoughts are not signed")] = None


class ToolUseBlock(Loose):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Name
    input: dict[str, Any]


def _known(*kinds: str, param: str = "messages") -> BeforeValidator:
    """Of blocks, only these; images and the like by name."""

    def check(value: Any) -> Any:
        for block in value if isinstance(value, list) else ():
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(kind, str) and kind not in kinds:
                name = kind if kind in ("image", "document", "search_result", *BLOCKS) else "this type"
                raise UnsupportedParameter(
                    f"{param}: content blocks of type {name}: not supported", param=param
                )
        return value

    return BeforeValidator(check)


Texts = Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)]


class ToolResultBlock(Loose):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)]
    content: Annotated[str | Texts, _known("text")] = ""
    is_error: Annotated[bool, Field(description='the model is told "Error: " before the content')] = False


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Discriminator("type")]


class TurnMessage(Loose):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | Annotated[list[Block], Field(min_length=1, max_length=MAX_BLOCKS)],
        _known(*BLOCKS),
        text_or("content blocks"),
    ]


class ClientTool(Loose):
    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Annotated[bool | None, Field(description="calls that are forced are strict in any case")] = None


def _only_custom(value: Any) -> Any:
    for tool in value if isinstance(value, list) else ():
        if isinstance(tool, dict) and tool.get("type") not in (None, "custom"):
            raise UnsupportedParameter("tools: only tools of type custom are supported", param="tools")
    return value


class WantedTool(Loose):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Loose):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_INT64)] | None = None
    display: Literal["summarized"] | None = None


class JsonFormat(Loose):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Loose):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Conversing(Sampling):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_format": (),
        "prompt_logprobs": (),
        "speed": ("standard",),
    }

    messages: Annotated[list[TurnMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Annotated[str | Texts, _known("text", param="system")] = ""
    stop_sequences: Annotated[list[StopText], Field(default_factory=list, max_length=4)]
    tools: Annotated[
        list[ClientTool], BeforeValidator(_only_custom), Field(default_factory=list, max_length=128)
    ]
    tool_choice: WantedTool | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def ignored(self) -> list[str]:
        """A call that is forced leaves nothing to say, and no form for it."""
        forced = self.tool_choice is not None and self.tool_choice.type in ("any", "tool")
        vain = forced and self.output_config is not None and self.output_config.format is not None
        forms = ["output_config.format"] if vain else []
        return [*super().ignored(), *forms, *without_tools(self, self.tools)]


class MessagesRequest(Conversing):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)]


class CountTokensRequest(Conversing):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT64)] | None = None
