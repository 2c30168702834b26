"""/v1/completions: the request."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from server.api.schema.sampling import MAX_INT64, TokenId
from server.api.schema.structured import Structured

MAX_PROMPTS = 256
DEFAULT_TOKENS = 16  # OpenAI's, for this route

Prompt = str | list[TokenId]


def as_prompts(value: Any) -> Any:
    """One text or one list of token ids becomes a list of one prompt."""
    match value:
        case str():
            return [value]
        case [int(), *rest] if all(type(item) is int for item in rest):
            return [value]
        case [*items] if all(isinstance(item, str) for item in items) or all(
            isinstance(item, list) and item and all(type(token) is int for token in item) for item in items
        ):
            return value
        case _:
            raise ValueError("must be a text, a list of token ids, or a list of one kind of these")


# As it is written: also one prompt alone, and never a list that mixes kinds.
PROMPTS = BeforeValidator(
    as_prompts,
    json_schema_input_type=str
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
    ],
)


class CompletionRequest(Structured):
    prompt: Annotated[list[Prompt], PROMPTS, Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT64)] = DEFAULT_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    suffix: Annotated[str | None, Field(description="the answer fills in what stands before it")] = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("best_of: must be at least n")
        if self.suffix and self.echo:
            raise ValueError("echo: not possible with suffix")
        if self.stream and self.candidates > self.n:
            raise ValueError("best_of: must equal n with stream: true")
        return self

    @property
    def scored_prompt(self) -> int | None:
        """SamplingParams.prompt_logprobs: for `echo`, for `prompt_logprobs`, or enough for both."""
        asked = [
            count
            for count in (self.prompt_logprobs, self.logprobs if self.echo else None)
            if count is not None
        ]
        return max(asked, default=None)

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of
