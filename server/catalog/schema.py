"""The JSON schema of models.yaml, for editors.

Written by `python -m server.catalog.schema > docs/models.schema.json`.
"""

import json
import sys

from server.catalog.fields import FIELDS, NAME_SCHEMA, Field


def _field_schema(field: Field) -> dict[str, object]:
    default = {} if field.default is None else {"default": field.default}
    return {"description": field.about, **default, **field.schema}


def models_schema() -> dict[str, object]:
    fields: dict[str, object] = {name: _field_schema(field) for name, field in FIELDS.items()}
    shape: dict[str, object] = {"type": "object", "required": ["source"], "additionalProperties": False}
    own_keys: dict[str, object] = {"patternProperties": {"^x-": {}}}  # a place for anchors
    keyed = {**shape, **own_keys, "properties": fields}
    identified = {
        **keyed,
        "properties": {"id": {"description": "The model's name in requests.", **NAME_SCHEMA}, **fields},
        "required": ["id", "source"],
    }
    models = {
        "description": "The models that the server offers: a list, or a mapping from id to model.",
        "anyOf": [
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/identified"}},
            {
                "type": "object",
                "minProperties": 1,
                "propertyNames": NAME_SCHEMA,
                "additionalProperties": {"$ref": "#/$defs/keyed"},
            },
        ],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "quantserve models.yaml",
        "type": "object",
        "required": ["models"],
        "properties": {"models": models},
        "additionalProperties": False,
        **own_keys,
        "$defs": {"identified": identified, "keyed": keyed},
    }


def schema_text() -> str:
    return json.dumps(models_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
