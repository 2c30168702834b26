"""Parameters that the routes which generate text share, with OpenAI's bounds; and those of our own."""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo

from server.api.schema.base import BOOKKEEPING, Body, Loose, other_names
from server.errors import UnsupportedParameter

MAX_INT64 = 2**63 - 1
MAX_TOP = 20  # likely tokens that are listed at one position
MAX_STOP_CHARS = 1000  # text that might be the start of a stop string is held back

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopText], Field(max_length=4)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopTexts = Annotated[
    list[StopText],
    BeforeValidator(_as_list, json_schema_input_type=StopText | Stops),
    Field(default_factory=list, max_length=4),
]


def _each_token_once(biases: dict[str, float]) -> dict[str, float]:
    """JSON's names are texts: 5 and 05 are two of them."""
    if len({int(token) for token in biases}) < len(biases):
        raise ValueError("names one token id twice")
    return biases


class StreamOptions(Loose):
    include_usage: bool = False


class Sampling(Body):
    """Of all of them: which model, how tokens are chosen, how the answer comes."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT64, description="0 and -1: off")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(default_factory=dict, max_length=1024),
        AfterValidator(_each_token_once),
    ]
    stop_token_ids: Annotated[list[TokenId], Field(default_factory=list, max_length=64)]
    stream: bool = False
    timeout: Annotated[float, Field(gt=0, le=86_400, description="seconds for the answer")] | None = None
    priority: Annotated[int, Field(ge=0, le=100, description="larger runs later")] = 0

    def refuse_unsupported(self) -> None:
        """Also what only another route has: a wish that is known, and that this one cannot fulfil."""
        super().refuse_unsupported()
        for name, value in (self.model_extra or {}).items():
            if name in self.UNSUPPORTED or name not in _of_all_routes() or name in _own_names(type(self)):
                continue
            if value in _of_all_routes()[name]:
                continue
            raise UnsupportedParameter(f"{name}: this route has no such parameter", param=name)


class Completing(Sampling):
    """Of chat and completions."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    prompt_logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_TOP, description="so many of the likeliest tokens at each of the prompt's"),
    ] = None
    stop: StopTexts
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Completing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_prompt(self) -> "Completing":
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not possible with stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


@cache
def _of_all_routes() -> dict[str, list[object]]:
    """Parameters of all routes that generate text, with the values that ask for nothing.

    But for what a route cannot do without, such as `prompt`: one body may serve several routes.
    """
    found: dict[str, list[object]] = {}
    for body in _below(Sampling):
        for field, info in body.model_fields.items():
            for one in () if info.is_required() else _names(field, info):
                found.setdefault(one, [None]).append(info.get_default(call_default_factory=True))
    return {name: values for name, values in found.items() if name not in BOOKKEEPING}


@cache
def _own_names(body: type[Sampling]) -> frozenset[str]:
    return frozenset(one for field, info in body.model_fields.items() for one in _names(field, info))


def _below(body: type[Sampling]) -> Iterator[type[Sampling]]:
    for kind in body.__subclasses__():
        yield kind
        yield from _below(kind)


def _names(name: str, info: FieldInfo) -> Iterator[str]:
    yield name
    yield from other_names(name, info)
