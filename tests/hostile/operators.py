"""Valid requests, and ways to spoil them a little: some stay valid, and reach the engine."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
SHORT = 6  # tokens of an answer
ANSWER = {"role": "assistant", "content": "b"}
USER = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_w", "parameters": SCHEMA}}

VALID: tuple[tuple[str, Json], ...] = (
    (CHAT, {"messages": USER}),
    (CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": USER, "temperature": 1.0, "top_p": 0.9, "seed": 7, "n": 2}),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": USER, "stop": ["a", "\n"], "presence_penalty": 1.5, "frequency_penalty": -1.5}),
    (CHAT, {"messages": USER, "logit_bias": {"5": -100, "7": 3.5}, "min_p": 0.1, "top_k": 4}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Once"}]}]}),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "s"},
                *USER,
                {"role": "assistant", "content": "b"},
                *USER,
            ]
        },
    ),
    (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40}),
    (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "none"}),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}),
    (
        CHAT,
        {
            "messages": USER,
            "max_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
    ),
    (COMPLETIONS, {"prompt": "Once upon a time"}),
    (COMPLETIONS, {"prompt": ["Once upon", "The dog"], "n": 2, "temperature": 1.0}),
    (COMPLETIONS, {"prompt": [1, 300, 301, 302]}),
    (COMPLETIONS, {"prompt": [[1, 300, 301], [1, 302, 303]], "logprobs": 2}),
    (COMPLETIONS, {"prompt": "Once upon a time", "echo": True, "logprobs": 1, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": "Once", "best_of": 3, "temperature": 1.0}),
    (COMPLETIONS, {"prompt": "Once", "stream": True, "repetition_penalty": 1.3}),
    (COMPLETIONS, {"prompt": "Once upon a time", "prompt_logprobs": 2, "max_tokens": 1}),
    (RESPONSES, {"input": "Once upon", "max_output_tokens": 16}),
    (RESPONSES, {"input": USER, "instructions": "be", "max_output_tokens": 16, "stream": True}),
    (MESSAGES, {"messages": USER, "system": "s"}),
    (MESSAGES, {"messages": USER, "stream": True, "stop_sequences": ["q"], "temperature": 0.5}),
    (COUNT, {"messages": USER}),
    ("/apply-template", {"messages": USER}),
    (EMBEDDINGS, {"input": ["a", "b", "c"], "encoding_format": "base64"}),
    (EMBEDDINGS, {"input": "hi"}),
    ("/tokenize", {"content": "Once upon a time"}),
    ("/detokenize", {"tokens": [1, 300, 301]}),
)

STRANGE_TEXTS = (
    "", " ", "\x00", "\ud800", "\u202e rtl", "e\u0301" * 50, "\U0001f469\u200d\U0001f467",
    "a" * 5000,
    "<|im_start|>system", "</s><s>", "{{ 7 * 7 }}", "{% for x in range(10**9) %}", "../../etc/passwd",
    "%s%n%x", "\r\n\r\ndata: [DONE]\r\n\r\n", "'\"\\", "\ufeff", "\u2028",
)  # fmt: skip
STRANGE_NUMBERS = (
    0, -1, 1, 2, 17, 1e-320, 0.5, -0.0, 1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30,
    1.5, True,
)  # fmt: skip


@dataclass(slots=True)
class Mutant:
    path: str
    body: Json
    raw: bytes | None = None  # sent as it is, in place of the body
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    operators: list[str] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return json.dumps(self.body).encode() if self.raw is None else self.raw


Operator = Callable[[Mutant, random.Random], None]


def _key(body: Json, rng: random.Random) -> str:
    return rng.choice([name for name in body if name != "model"] or ["model"])


def _leaf(mutant: Mutant, rng: random.Random) -> tuple[Any, Any]:
    """A container somewhere in the body, and a key or index of it."""
    place: Any = mutant.body
    key: Any = _key(place, rng)
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    return place, key


# -- still valid, or nearly ---------------------------------------------------------------------------


def say_something_else(mutant: Mutant, rng: random.Random) -> None:
    text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x2FFF)))) for _ in range(20))
    field = next((name for name in ("messages", "prompt", "input", "content") if name in mutant.body), "x")
    mutant.body[field] = [{"role": "user", "content": text}] if field == "messages" else text


def sample_otherwise(mutant: Mutant, rng: random.Random) -> None:
    values: Json = {"temperature": rng.uniform(0, 2), "top_p": rng.random(), "seed": rng.getrandbits(62)}
    values |= {"top_k": rng.randrange(50), "min_p": rng.random(), "repetition_penalty": rng.uniform(0.1, 10)}
    for name in rng.sample(list(values), 3):
        mutant.body[name] = values[name]


def bias_tokens(mutant: Mutant, rng: random.Random) -> None:
    mutant.body["logit_bias"] = {
        str(rng.randrange(400)): rng.uniform(-100, 100) for _ in range(rng.randrange(50))
    }


def stop_somewhere(mutant: Mutant, rng: random.Random) -> None:
    name = "stop_sequences" if mutant.path in (MESSAGES, COUNT) else "stop"
    mutant.body[name] = [rng.choice("abcdefgh ") * rng.randrange(1, 4) for _ in range(rng.randrange(1, 5))]


def turn_streaming(mutant: Mutant, rng: random.Random) -> None:
    mutant.body["stream"] = not mutant.body.pop("stream", False)
    mutant.body.pop("stream_options", None)


def add_a_field(mutant: Mutant, rng: random.Random) -> None:
    mutant.body[rng.choice(["x_vendor", "user", "metadata", "__proto__", "a" * 300])] = rng.choice(
        [1, None, "x", {"deep": {"er": [1]}}]
    )


def null_a_field(mutant: Mutant, rng: random.Random) -> None:
    mutant.body[rng.choice(["stop", "seed", "n", "top_p", "stream", "user", "logit_bias"])] = None


def ask_for_scores(mutant: Mutant, rng: random.Random) -> None:
    match mutant.path:
        case "/v1/chat/completions":
            mutant.body["logprobs"] = True
        case "/v1/responses":
            mutant.body["top_logprobs"] = rng.randrange(21)
        case "/v1/completions":
            mutant.body["logprobs"] = rng.randrange(6)


# -- mostly wrong -------------------------------------------------------------------------------------


def drop_a_field(mutant: Mutant, rng: random.Random) -> None:
    mutant.body.pop(rng.choice(list(mutant.body)))


def put_a_strange_text(mutant: Mutant, rng: random.Random) -> None:
    place, key = _leaf(mutant, rng)
    place[key] = rng.choice(STRANGE_TEXTS)


def put_a_strange_number(mutant: Mutant, rng: random.Random) -> None:
    place, key = _leaf(mutant, rng)
    place[key] = rng.choice(STRANGE_NUMBERS)


def put_another_type(mutant: Mutant, rng: random.Random) -> None:
    place, key = _leaf(mutant, rng)
    place[key] = copy.deepcopy(rng.choice([[], {}, [[]], {"type": "x"}, None, True, "x", 5, [None], [[[]]]]))


def make_a_list_long(mutant: Mutant, rng: random.Random) -> None:
    name = _key(mutant.body, rng)
    mutant.body[name] = [mutant.body[name]] * rng.choice([2, 5, 300])


def nest_deeply(mutant: Mutant, rng: random.Random) -> None:
    value: Any = "x"
    for _ in range(rng.choice([5, 40, 900])):
        value = [value] if rng.random() < 0.5 else {"properties": value}
    mutant.body[_key(mutant.body, rng)] = value


def swap_two_values(mutant: Mutant, rng: random.Random) -> None:
    one, other = _key(mutant.body, rng), _key(mutant.body, rng)
    mutant.body[one], mutant.body[other] = mutant.body[other], mutant.body[one]


def rename_a_field(mutant: Mutant, rng: random.Random) -> None:
    name = rng.choice(list(mutant.body))
    mutant.body[rng.choice([name.upper(), f"{name} ", name[:-1], f"{name}\x00"])] = mutant.body.pop(name)


def take_fields_of_another(mutant: Mutant, rng: random.Random) -> None:
    _, other = rng.choice(VALID)
    mutant.body |= copy.deepcopy(other)


def go_to_another_route(mutant: Mutant, rng: random.Random) -> None:
    mutant.path = rng.choice(VALID)[0]


# -- bytes and headers --------------------------------------------------------------------------------


def flip_bytes(mutant: Mutant, rng: random.Random) -> None:
    data = bytearray(mutant.data)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    mutant.raw = bytes(data)


def cut_the_end(mutant: Mutant, rng: random.Random) -> None:
    mutant.raw = mutant.data[: rng.randrange(len(mutant.data))]


def insert_bytes(mutant: Mutant, rng: random.Random) -> None:
    data, at = mutant.data, rng.randrange(len(mutant.data))
    mutant.raw = (
        data[:at] + rng.choice([b"\xff\xfe", b"\x00", b'"', b"{", b"NaN", b"1e999", b"\\ud800"]) + data[at:]
    )


def repeat_a_key(mutant: Mutant, rng: random.Random) -> None:
    mutant.raw = mutant.data[:-1] + b', "model": ' + rng.choice([b"5", b'"x"', b"null", b"[]"]) + b"}"


def say_another_type(mutant: Mutant, rng: random.Random) -> None:
    mutant.headers["content-type"] = rng.choice(
        [
            "text/plain",
            "",
            "application/json; charset=utf-16",
            "application/json;",
            "*/*",
            "multipart/form-data",
        ]
    )


def add_headers(mutant: Mutant, rng: random.Random) -> None:
    mutant.headers[rng.choice(["x-request-id", "accept", "expect", "x-forwarded-for", "cookie"])] = (
        rng.choice(["a" * 2000, "100-continue", "127.0.0.1", "*/*;q=x", "'; DROP TABLE", "text/event-stream"])
    )


GENTLE: tuple[Operator, ...] = (
    say_something_else, sample_otherwise, bias_tokens, stop_somewhere, turn_streaming, add_a_field,
    null_a_field, ask_for_scores, add_headers,
)  # fmt: skip
ROUGH: tuple[Operator, ...] = (
    drop_a_field, put_a_strange_text, put_a_strange_number, put_another_type, make_a_list_long, nest_deeply,
    swap_two_values, rename_a_field, take_fields_of_another, go_to_another_route,
)  # fmt: skip
RAW: tuple[Operator, ...] = (flip_bytes, cut_the_end, insert_bytes, repeat_a_key, say_another_type)
GENTLE_SHARE = 0.62


def mutant(model: str, rng: random.Random) -> Mutant:
    """One to three operators on a valid request, one of bytes at most and last."""
    path, fields = rng.choice(VALID)
    made = Mutant(path, copy.deepcopy({"model": model, "max_tokens": SHORT, **fields}))
    if path not in (CHAT, COMPLETIONS, MESSAGES):
        del made.body["max_tokens"]
    kind = GENTLE if rng.random() < GENTLE_SHARE else ROUGH
    chosen = rng.sample(kind, rng.randrange(1, 4))
    if kind is ROUGH and rng.random() < 0.3:
        chosen = [*chosen[:1], rng.choice(RAW)]
    for operator in chosen:
        operator(made, rng)
        made.operators.append(operator.__name__)
    return made
