"""`python tests/hostile/schemas.py URL MODEL [KEY]`: a thousand JSON schemas, most of them odd.

hypothesis-jsonschema (in the environment of tests/hostile/requirements.txt) makes them from the metaschema.
Each answer is a 400 that names a parameter, or of the form: one that is complete satisfies its schema. Ends
with 1 where one is neither, or takes more than 15 s.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis_jsonschema import from_schema
from jsonschema import Draft7Validator, Draft202012Validator

SCHEMAS = 1000
SEED = 20251125
DEPTH = 2
TOKENS = 96  # of an answer
SLOWEST_S = 15.0
LEAVES: list[Any] = [
    True,
    {},
    *({"type": kind} for kind in ("string", "integer", "boolean", "null", "number")),
]
LEFT_OUT = ("$ref", "$id", "$schema", "default", "examples", "$comment", "readOnly")

Schema = dict[str, Any]


def metaschema(depth: int) -> Schema:
    """Draft 7's, without references: schemas within schemas end at `depth`."""
    whole: Mapping[str, Any] = Draft7Validator.META_SCHEMA
    properties = {name: part for name, part in whole["properties"].items() if name not in LEFT_OUT}
    made: Schema = _resolved({"type": "object", "properties": properties, "minProperties": 1}, whole, depth)
    return {**made, "additionalProperties": False}


def _resolved(part: Any, whole: Mapping[str, Any], depth: int) -> Any:
    match part:
        case {"$ref": "#"}:
            return metaschema(depth - 1) if depth > 1 else {"enum": LEAVES}
        case {"$ref": str(name)}:
            return _resolved(whole["definitions"][name.rpartition("/")[2]], whole, depth)
        case dict():
            return {key: _resolved(item, whole, depth) for key, item in part.items() if key != "default"}
        case list():
            return [_resolved(item, whole, depth) for item in part]
    return part


class Attempt:
    def __init__(self, url: str, model: str, key: str) -> None:
        self._http = requests.Session()
        self._http.headers["authorization"] = f"Bearer {key}"
        self._url, self._model = url, model
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def __call__(self, schema: Schema) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "odd", "schema": schema}}
        asked = [{"role": "user", "content": "Write one."}]
        body: dict[str, Any] = {"model": self._model, "messages": asked, "response_format": wanted}
        body |= {"max_tokens": TOKENS, "temperature": 1, "seed": 1}
        started = time.monotonic()
        response = self._http.post(f"{self._url}/v1/chat/completions", json=body, timeout=120)
        fault = self._judged(response, schema)
        if (seconds := time.monotonic() - started) > SLOWEST_S:
            fault = f"{seconds:.1f} s"
        if fault is not None:
            self.faults.append(f"{fault}: {json.dumps(schema)}")

    def _judged(self, response: requests.Response, schema: Schema) -> str | None:
        answer = response.json()
        if response.status_code == 400:
            self.outcomes["refused"] += 1
            return None if answer["error"]["param"] == "response_format" else "no parameter is named"
        if response.status_code != 200:
            return f"status {response.status_code}"
        choice = answer["choices"][0]
        self.outcomes[choice["finish_reason"]] += 1
        if choice["finish_reason"] != "stop":
            return None
        try:
            Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it
            return f"{type(error).__name__} in {choice['message']['content']!r}"
        return None


def main(url: str, model: str, key: str = "none") -> int:
    attempt = Attempt(url, model, key)

    @seed(SEED)
    @settings(
        max_examples=SCHEMAS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(from_schema(metaschema(DEPTH)))
    def every(schema: Schema) -> None:
        attempt(schema)

    every()
    print(f"{sum(attempt.outcomes.values())} schemas: {dict(attempt.outcomes)}, {len(attempt.faults)} faults")
    print("\n".join(attempt.faults[:20]))
    return int(bool(attempt.faults))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
