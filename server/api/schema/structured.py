"""What an answer must be: the ways to ask for it, and what they come to."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from server.api.schema.base import Loose
from server.api.schema.sampling import Completing
from server.errors import RequestError, UnsupportedParameter
from server.text.schemas import MAX_ENUM, check_expression, check_schema, check_size, settled
from server.types import Grammar

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ENUM)]


def _parsed(value: Any) -> Any:
    """A schema may come as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON schema") from None


Schema = Annotated[dict[str, Any], BeforeValidator(_parsed)]


SchemaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # OpenAI's


class NamedSchema(Loose):
    name: SchemaName | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: Annotated[bool | None, Field(description="schemas are enforced in any case")] = None


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


VLLM_ONLY = ("structural_tag", "whitespace_pattern")  # they bound the answer, too


class StructuredOutputs(Loose):
    """One of these, under vLLM's names."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: Annotated[str | None, Field(description="Lark, as llguidance reads it")] = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _nothing_else_bounds(self) -> "StructuredOutputs":
        for name in VLLM_ONLY:
            if (self.model_extra or {}).get(name) is not None:
                raise UnsupportedParameter(
                    f"structured_outputs: {name}: not supported", param="structured_outputs"
                )
        return self

    @property
    def bounds(self) -> bool:
        others = (self.json_, self.regex, self.choice, self.grammar)
        return bool(self.json_object) or any(value is not None for value in others)


class Structured(Completing):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Annotated[
        str | None, Field(validation_alias=AliasChoices("guided_regex", "regex"), min_length=1)
    ] = None
    guided_choice: Annotated[
        Choices | None, Field(validation_alias=AliasChoices("guided_choice", "choice"))
    ] = None
    guided_grammar: Annotated[
        str | None, Field(validation_alias=AliasChoices("guided_grammar", "lark"), min_length=1)
    ] = None

    def grammar(self, *, allows_lark: bool) -> Grammar | None:
        """What the answer must be; None: anything. Raises RequestError."""
        found = {**self._formats(), **self._guided()}
        grammars = list(found.values())
        if len(found) > 1:
            names = " and ".join(list(found)[:2])
            raise RequestError(f"{names}: only one of them may bound the answer", param=grammars[1].param)
        if found and grammars[0].kind == "lark" and not allows_lark:
            param = grammars[0].param
            raise UnsupportedParameter(f"{param}: grammars are switched off on this server", param=param)
        return grammars[0] if found else None

    @property
    def has_format(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    def ignored(self) -> list[str]:
        """`structured_outputs` that bounds nothing is one of them."""
        vain = self.structured_outputs is not None and not self.structured_outputs.bounds
        return [*super().ignored(), *(["structured_outputs"] if vain else [])]

    def _formats(self) -> dict[str, Grammar]:
        if self.response_format is None or self.response_format.type == "text":
            return {}
        if self.response_format.type == "json_object":
            return {"response_format": any_object("response_format")}
        named = self.response_format.json_schema
        if named is None or named.schema_ is None:
            raise RequestError(
                "response_format: type json_schema needs json_schema.schema", param="response_format"
            )
        return {"response_format": of_schema(named.schema_, "response_format")}

    def _guided(self) -> dict[str, Grammar]:
        """By the names that the client has for them."""
        outputs = self.structured_outputs or StructuredOutputs()
        param = "structured_outputs"
        found = {
            "structured_outputs.json": of_kind("json", outputs.json_, param),
            "structured_outputs.regex": of_kind("regex", outputs.regex, param),
            "structured_outputs.choice": of_kind("choice", outputs.choice, param),
            "structured_outputs.grammar": of_kind("grammar", outputs.grammar, param),
            "structured_outputs.json_object": any_object(param) if outputs.json_object else None,
            "guided_json": of_kind("json", self.guided_json, "guided_json"),
            (regex := self.called("guided_regex")): of_kind("regex", self.guided_regex, regex),
            (choice := self.called("guided_choice")): of_kind("choice", self.guided_choice, choice),
            (lark := self.called("guided_grammar")): of_kind("grammar", self.guided_grammar, lark),
        }
        return {name: grammar for name, grammar in found.items() if grammar is not None}


def of_kind(kind: Literal["json", "regex", "choice", "grammar"], value: Any, param: str) -> Grammar | None:
    """Raises RequestError for one beyond the bounds."""
    if value is None:
        return None
    match kind:
        case "json":
            return of_schema(value, param)
        case "choice":
            text = json.dumps(value, ensure_ascii=False)
            check_size(text, param)
            return Grammar(kind="choice", text=text, param=param)
        case "regex":
            check_expression(value, param)
            return Grammar(kind="regex", text=value, param=param)
        case "grammar":
            check_expression(value, param)
            return Grammar(kind="lark", text=value, param=param)


def of_schema(schema: Mapping[str, Any], param: str) -> Grammar:
    check_schema(dict(schema), param)
    return Grammar(kind="json_schema", text=settled(dict(schema)), param=param)


def any_object(param: str) -> Grammar:
    return Grammar(kind="json_schema", text='{"type":"object"}', param=param)
