"""/tokenize and /detokenize: the requests."""

from typing import Annotated

from pydantic import AliasChoices, Field

from server.api.schema.base import Body
from server.api.schema.sampling import TokenId

MAX_TOKENS = 1_000_000


class TokenizeRequest(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    content: Annotated[str, Field(validation_alias=AliasChoices("content", "prompt"))]
    add_special: Annotated[
        bool, Field(validation_alias=AliasChoices("add_special", "add_special_tokens"))
    ] = True


class DetokenizeRequest(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
