"""/v1/embeddings: the request and its answer."""

from typing import Annotated, Literal

from msgspec import Struct
from pydantic import Field

from server.api.schema.base import Body
from server.api.schema.completions import MAX_PROMPTS, PROMPTS, Prompt


class EmbeddingRequest(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[list[Prompt], PROMPTS, Field(min_length=1, max_length=MAX_PROMPTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class Embedding(Struct, frozen=True, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str  # base64 of little-endian float32


class EmbeddingUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
